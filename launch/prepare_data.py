"""Make or convert training data: one subcommand a data set.

    python launch/prepare_data.py arrow-maze

draws the demo task (23,000 pictures, some 20 seconds) and builds the tiny model it is learned with:

    data/arrow_maze/shards/{train,val,test,test_paths}/   what args/demo.yaml trains and evaluates on
    data/arrow_maze/examples/                             a few records as JSON with pictures, to look at
    data/arrow_maze/model/                                model and tokenizer in Hugging Face format
    data/arrow_maze/arrow_maze.json                       the facts: settings, balance of answers, look-up floors

What is there already is left alone, so the command may be repeated at no cost.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.data import arrow_maze
from coconut.data.arrow_maze_files import ensure_arrow_maze
from coconut.types import CoconutError, ConfigError

MODEL_MARKER = "made_by_prepare_data.json"


def prepare_arrow_maze(
    out: Path,
    *,
    seed: int = 0,
    size: int = arrow_maze.GRID * arrow_maze.CELL_PX,
    sizes: Mapping[str, int] | None = None,
    model_seed: int = 0,
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
        model_out: folder of the model; `out`/model when left out.
        force: replace what was made with other settings.
    """
    if size % (2 * arrow_maze.GRID):
        raise ConfigError(f"--size {size} is not a multiple of {2 * arrow_maze.GRID} (two patches for each of 4 cells)")
    model_out = model_out or out / "model"
    with _alone(out):
        begin = time.perf_counter()
        made = ensure_arrow_maze(out, seed=seed, cell_px=size // arrow_maze.GRID, sizes=sizes, force=force)
        _say(f"data {'made' if made else 'there already'}: {out / 'shards'}", begin)
        begin = time.perf_counter()
        made = ensure_model(model_out, seed=model_seed, size=size, force=force)
        _say(f"model {'made' if made else 'there already'}: {model_out}", begin)


def ensure_model(out: Path, *, seed: int, size: int, force: bool) -> bool:
    """Save the tiny InternVL with the maze's vocabulary, unless `out` holds it; returns whether it was built."""
    request = {"seed": seed, "size": size, "words": list(arrow_maze.vocabulary())}
    marker = out / MODEL_MARKER
    if marker.exists() and not force:
        found = json.loads(marker.read_text(encoding="utf-8"))
        if found == request:
            return False
        raise ConfigError(
            f"{out} holds a model made with other settings; use --force, or --model-out for another folder"
        )
    if out.exists() and not marker.exists():
        raise ConfigError(f"{out} exists but was not made by this command; choose another folder with --model-out")

    # Here, not above: these take seconds to import, and a run that finds all in place needs neither.
    from transformers.utils.logging import disable_progress_bar

    from coconut.data.image import ImageProcessor
    from coconut.model.tiny import build_tiny_internvl, build_word_tokenizer, save_tiny

    def add_the_rest(folder: Path) -> None:
        processor = ImageProcessor(image_size=size, max_num_patches=1, use_thumbnail=False, dynamic_preprocess=False)
        processor.save_pretrained(folder)
        (folder / MODEL_MARKER).write_text(json.dumps(request), encoding="utf-8")

    disable_progress_bar()  # for files of kilobytes
    tokenizer = build_word_tokenizer(arrow_maze.vocabulary())
    # Two patches a cell and side, whatever the size: pixel shuffle makes one image token a cell of them.
    model = build_tiny_internvl(tokenizer, seed=seed, image_size=size, patch_size=size // (2 * arrow_maze.GRID))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_tiny(model, tokenizer, out, finish=add_the_rest)
    return True


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
        model_out=arguments.model_out,
        force=arguments.force,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="DATASET")
    for add in (_add_arrow_maze,):  # further converters: one function each, listed here
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
