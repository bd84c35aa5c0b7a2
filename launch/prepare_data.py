"""Make or convert training data: one subcommand a data set.

    python launch/prepare_data.py arrow-maze

draws the demo task (23,000 pictures, some 20 seconds) and builds the tiny model it is learned with:

    data/arrow_maze/shards/{train,val,test,test_paths}/   what args/demo.yaml trains and evaluates on
    data/arrow_maze/examples/                             a few records as JSON with pictures, to look at
    data/arrow_maze/model/                                model and tokenizer in Hugging Face format
    data/arrow_maze/arrow_maze.json                       the facts: settings, balance of answers, look-up floors

What is there already is left alone, so the command may be repeated at no cost.

    python launch/prepare_data.py aokvqa --from downloads/aokvqa --coco downloads/coco --split train --out data/aokvqa
    python launch/prepare_data.py prosqa --generate --picture --out data/prosqa

convert a public data set that you have downloaded (or, with --hub, that Hugging Face `datasets` loads), or generate
one, and write OUT/SPLIT.json, which training reads and launch/make_shards.py shards. docs/data_format.md lists all.

    python launch/prepare_data.py decoder --text data/prosqa/train.json --model-out data/prosqa/model

builds a small text-only model with random weights, and a tokenizer learned from that text, to train from scratch.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.data import arrow_maze, prosqa
from coconut.data.arrow_maze_files import ensure_arrow_maze
from coconut.data.converters import columns, sources, textual, visual
from coconut.data.converters.write import write_split
from coconut.evaluation.result import require_folder
from coconut.types import CoconutError, ConfigError, DataError, Sample
from launch.prepare_models import ensure_decoder, ensure_model


def prepare_arrow_maze(
    out: Path,
    *,
    seed: int = 0,
    size: int = arrow_maze.GRID * arrow_maze.CELL_PX,
    sizes: Mapping[str, int] | None = None,
    model_seed: int = 0,
    model_layers: int = 3,
    model_out: Path | None = None,
    force: bool = False,
) -> None:
    """Make data and model of the demo, as far as they are missing; `launch/train.py` and the demo call this too.

    Args:
        out: folder of the data.
        seed: decides the puzzles.
        size: pixels a side of a picture.
        sizes: puzzles of each split, when other than the default.
        model_seed: decides the model's first weights.
        model_layers: of its decoder.
        model_out: folder of the model; `out`/model when left out.
        force: replace what was made with other settings.
    """
    if size % (2 * arrow_maze.GRID):
        raise ConfigError(f"--size {size} is not a multiple of {2 * arrow_maze.GRID} (two patches for each of 4 cells)")
    model_out = model_out or out / "model"
    require_folder(out)
    with _alone(out):
        begin = time.perf_counter()
        made = ensure_arrow_maze(out, seed=seed, cell_px=size // arrow_maze.GRID, sizes=sizes, force=force)
        _say(f"data {'made' if made else 'there already'}: {out / 'shards'}", begin)
        begin = time.perf_counter()
        made = ensure_model(model_out, seed=model_seed, size=size, layers=model_layers, force=force)
        _say(f"model {'made' if made else 'there already'}: {model_out}", begin)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder's lock: of several ranks one makes the data, and the others then find it there."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when the process dies
        yield


def _say(text: str, begin: float) -> None:
    print(f"{text} ({time.perf_counter() - begin:.1f} s)", flush=True)


def _add_arrow_maze(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("arrow-maze", help="draw the demo task and build its tiny model")
    parser.add_argument(
        "--out", type=Path, default=Path("data/arrow_maze"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the puzzles (default: %(default)s)")
    parser.add_argument("--size", type=int, default=112, help="pixels a side of a picture (default: %(default)s)")
    for split, number in arrow_maze.SPLIT_SIZES.items():
        flag = "--" + split.replace("_", "-")
        parser.add_argument(flag, type=int, default=number, help=f"puzzles in {split} (default: %(default)s)")
    parser.add_argument(
        "--model-seed", type=int, default=0, help="decides the model's first weights (default: %(default)s)"
    )
    parser.add_argument(
        "--model-layers", type=int, default=3, help="layers of the model's decoder (default: %(default)s)"
    )
    parser.add_argument("--model-out", type=Path, help="folder of the model (default: OUT/model)")
    parser.add_argument("--force", action="store_true", help="replace data and model made with other settings")
    parser.set_defaults(run=_run_arrow_maze)


def _run_arrow_maze(arguments: argparse.Namespace) -> None:
    prepare_arrow_maze(
        arguments.out,
        seed=arguments.seed,
        size=arguments.size,
        sizes={split: getattr(arguments, split) for split in arrow_maze.SPLIT_SIZES},
        model_seed=arguments.model_seed,
        model_layers=arguments.model_layers,
        model_out=arguments.model_out,
        force=arguments.force,
    )


def _converter(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    convert: Callable[[argparse.Namespace], Iterable[Sample]],
    help_: str,
    *,
    splits: tuple[str, ...] = ("train", "val", "test"),
    source_help: str,
) -> argparse.ArgumentParser:
    """The options that every converter has."""
    parser = commands.add_parser(name, help=help_)
    parser.add_argument("--from", dest="source", type=Path, default=Path(f"downloads/{name}"), help=source_help)
    parser.add_argument("--out", type=Path, default=Path(f"data/{name}"), help="folder to write (default: %(default)s)")
    parser.add_argument("--split", choices=splits, default=splits[0], help="which split (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="convert no more than so many samples")
    parser.set_defaults(run=partial(_run_converter, convert))
    return parser


def _run_converter(convert: Callable[[argparse.Namespace], Iterable[Sample]], arguments: argparse.Namespace) -> None:
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}; give a number of at least 1, or leave it out for all")
    require_folder(arguments.out)
    begin = time.perf_counter()
    number = write_split(islice(convert(arguments), arguments.limit), arguments.out, arguments.split)
    _say(f"{arguments.out / arguments.split}.json: {number} samples", begin)


def _add_hub(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--hub", nargs="?", const=default, metavar="ID", help=f"load from the Hugging Face hub (default: {default})"
    )


def _rows(arguments: argparse.Namespace, names: list[str], download: str) -> Iterator[tuple[str, sources.Row]]:
    if getattr(arguments, "hub", None):
        split = {"val": "validation"}.get(arguments.split, arguments.split)
        return sources.hub_rows(arguments.hub, split)
    return sources.read_rows(sources.find(arguments.source, names, download))


def _add_aokvqa(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    def convert(arguments: argparse.Namespace) -> Iterable[Sample]:
        if arguments.split == "test":
            raise DataError("the test split of A-OKVQA has no answers; use --split train or val")
        rows = _rows(
            arguments,
            [f"aokvqa_v1p0_{arguments.split}.json", f"*{arguments.split}*.parquet"],
            "download aokvqa_v1p0.tar.gz (github.com/allenai/aokvqa) and unpack it there",
        )
        choices = arguments.answers == "choice"
        return visual.aokvqa(rows, arguments.coco, arguments.split, choices=choices, rationales=arguments.rationales)

    parser = _converter(commands, "aokvqa", convert, "A-OKVQA", source_help="folder of aokvqa_v1p0_SPLIT.json")
    parser.add_argument("--coco", type=Path, default=Path("downloads/coco"), help="folder of train2017, val2017")
    parser.add_argument("--answers", choices=("choice", "direct"), default="choice", help="multiple choice, or direct")
    parser.add_argument(
        "--rationales",
        choices=visual.RATIONALES,
        default="sentences",
        help="the three are alternatives: the first as one step, a sample of each, or the first in sentences",
    )
    _add_hub(parser, "HuggingFaceM4/A-OKVQA")


def _add_scienceqa(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    def convert(arguments: argparse.Namespace) -> Iterable[Sample]:
        names, download = (
            ["problems.json", f"*{arguments.split}*.parquet"],
            "download it from github.com/lupantech/ScienceQA",
        )
        if arguments.hub:
            rows = _rows(arguments, names, download)
        else:
            path = sources.find(arguments.source, names, download)[0]
            if path.suffix == ".parquet":
                rows = _rows(arguments, names, download)
            else:
                rows = visual.scienceqa_problems(sources.read_object(path), str(path), arguments.split)
        return visual.scienceqa(rows, arguments.images or arguments.source / "images", lecture=arguments.lecture)

    parser = _converter(commands, "scienceqa", convert, "ScienceQA", source_help="folder of problems.json")
    parser.add_argument("--images", type=Path, help="folder of SPLIT/ID/image.png (default: FROM/images)")
    parser.add_argument("--lecture", action="store_true", help="put the lecture's sentences before the solution's")
    _add_hub(parser, "derek-thomas/ScienceQA")


def _add_m3cot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    def convert(arguments: argparse.Namespace) -> Iterable[Sample]:
        file = {"val": "dev"}.get(arguments.split, arguments.split)
        names = [f"data/{file}.jsonl", f"{file}.jsonl", f"*{arguments.split}*.parquet"]
        rows = _rows(arguments, names, "download the data from github.com/LightChen233/M3CoT")
        return visual.m3cot(rows, arguments.images or arguments.source / "images")

    parser = _converter(commands, "m3cot", convert, "M3CoT", source_help="folder of data/{train,dev,test}.jsonl")
    parser.add_argument("--images", type=Path, help="folder of the images (default: FROM/images)")
    _add_hub(parser, "LightChen2333/M3CoT")


def _add_llava_cot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    def convert(arguments: argparse.Namespace) -> Iterable[Sample]:
        download = "download train.jsonl and the images of Xkev/LLaVA-CoT-100k from the hub"
        rows = _rows(arguments, [f"{arguments.split}.jsonl"], download)
        return visual.llava_cot(rows, arguments.images or arguments.source)

    parser = _converter(
        commands, "llava-cot", convert, "LLaVA-CoT-100k", splits=("train",), source_help="folder of train.jsonl"
    )
    parser.add_argument("--images", type=Path, help="folder that image paths start from (default: FROM)")


def _add_gsm8k(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    def convert(arguments: argparse.Namespace) -> Iterable[Sample]:
        file = {"val": "valid"}.get(arguments.split, arguments.split)
        names = [f"{file}.txt", f"gsm_{file}.txt", f"gsm_{file}.json", f"*{file}*.parquet"]
        download = "download data/gsm8k of github.com/da03/Internalize_CoT_Step_by_Step"
        if not arguments.hub:
            path = sources.find(arguments.source, names, download)[0]
            if path.suffix == ".txt":
                return textual.gsm8k(textual.gsm8k_lines(path), arguments.split)
        return textual.gsm8k(_rows(arguments, names, download), arguments.split)

    parser = _converter(
        commands, "gsm8k-aug", convert, "GSM8K-Aug, text", source_help="folder of {train,valid,test}.txt"
    )
    _add_hub(parser, "zen-E/GSM8k-Aug")


_OF_GENERATION = ("size", "nodes", "names", "even", "terse", "recite")


def _add_prosqa(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    def convert(arguments: argparse.Namespace) -> Iterable[Sample]:
        if arguments.recite and arguments.picture:
            raise ConfigError("--recite reads statements out of a text; leave out --picture")
        if arguments.generate:
            size = arguments.size if arguments.size is not None else prosqa.SPLIT_SIZES[arguments.split]
            drawn = prosqa.generate(
                arguments.split,
                size,
                arguments.seed,
                prosqa.N_NODES if arguments.nodes is None else arguments.nodes,
                arguments.names,
                arguments.even,
                arguments.terse,
                arguments.recite,
            )
            rows: Iterable[tuple[str, sources.Row]] = ((f"generated:{i}", row) for i, row in enumerate(drawn))
        else:
            given = [f"--{name}" for name in _OF_GENERATION if getattr(arguments, name) not in (None, False)]
            if given:
                raise ConfigError(f"{', '.join(given)} decide what --generate draws: give that too, or leave them out")
            file = {"val": "valid"}.get(arguments.split, arguments.split)
            download = "download data/ of github.com/facebookresearch/coconut, or use --generate"
            rows = _rows(arguments, [f"prosqa_{file}.json"], download)
        return textual.prosqa(rows, arguments.split, picture=arguments.picture)

    parser = _converter(
        commands, "prosqa", convert, "ProsQA, read or generated", source_help="folder of prosqa_{train,valid,test}.json"
    )
    parser.add_argument("--generate", action="store_true", help="make problems by the paper's procedure")
    parser.add_argument("--picture", action="store_true", help="draw the graph, and ask the closing question alone")
    parser.add_argument("--size", type=int, help="problems to generate (default: the public split's number)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is generated (default: %(default)s)")
    parser.add_argument("--nodes", type=int, help=f"nodes of a graph (default: {prosqa.N_NODES})")
    names = f"names of concepts in use, half as many of entities (default: all {len(prosqa.CONCEPTS)})"
    parser.add_argument("--names", type=int, help=names)
    even = "the wrong answer lies as deep as the right one, so that only following edges tells them apart"
    parser.add_argument("--even", action="store_true", help=even)
    terse = "say an edge with its two names alone; a tiny decoder learns it sooner"
    parser.add_argument("--terse", action="store_true", help=terse)
    recite = "ask to read the statements out in another order: what a decoder with random weights has to learn first"
    parser.add_argument("--recite", action="store_true", help=recite)


def _add_decoder(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "decoder", help="build a small text-only model with random weights, to train from scratch"
    )
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="SPLIT.json whose texts the tokenizer is learned from")
    add("--model-out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--family", default="qwen2", help="gpt2, llama or qwen2 (default: %(default)s)")
    add("--layers", type=int, default=3, help="of the decoder (default: %(default)s)")
    add("--hidden", type=int, default=64, help="width of the decoder (default: %(default)s)")
    add("--heads", type=int, default=4, help="attention heads a layer (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides the first weights (default: %(default)s)")
    add("--force", action="store_true", help="replace a model made with other settings")
    parser.set_defaults(run=_run_decoder)


def _run_decoder(arguments: argparse.Namespace) -> None:
    begin = time.perf_counter()
    if not arguments.text.is_file():
        raise DataError(f"--text {arguments.text} is no file; `prepare_data.py prosqa --generate` writes one")
    options = {name: getattr(arguments, name) for name in ("family", "layers", "hidden", "heads", "seed", "force")}
    made = ensure_decoder(arguments.model_out, arguments.text, **options)
    _say(f"model {'made' if made else 'there already'}: {arguments.model_out}", begin)


def _add_columns(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    def convert(arguments: argparse.Namespace) -> Iterable[Sample]:
        if not arguments.source.is_file():
            raise DataError(f"--from {arguments.source} is no file; name a .json, .jsonl or .parquet file")
        names = {name: theirs for name in columns.COLUMNS if (theirs := getattr(arguments, f"column_{name}"))}
        images = arguments.images or arguments.source.parent
        return columns.columns(sources.read_rows([arguments.source]), names, images, split_steps=arguments.split_steps)

    parser = _converter(
        commands, "columns", convert, "any JSON, JSONL or Parquet file", source_help="a .json, .jsonl or .parquet file"
    )
    for name in columns.COLUMNS:
        parser.add_argument(f"--{name}", dest=f"column_{name}", metavar="COLUMN", help=f"column of the {name}")
    parser.add_argument("--images", type=Path, help="folder that image paths start from (default: the file's)")
    parser.add_argument(
        "--split-steps", choices=columns.SPLITS, default="sentences", help="how steps that are one text are cut"
    )


DATASETS = (
    _add_arrow_maze,
    _add_aokvqa,
    _add_scienceqa,
    _add_m3cot,
    _add_llava_cot,
    _add_gsm8k,
    _add_prosqa,
    _add_columns,
    _add_decoder,
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="DATASET")
    for add in DATASETS:
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except CoconutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
