"""Hand a trained model on: a folder that plain transformers loads, with a model card; or bring one in.

    python launch/export.py --checkpoint RUN --out OUT --eval RUN/eval/test RUN/eval/test-noise
    python launch/export.py --checkpoint RUN --out OUT --push-to-hub OWNER/NAME
    python launch/export.py --checkpoint RUN --out OUT --original-internvl InternVL3-1B-Pretrained    also OUT/original
    python launch/export.py --original checkpoint_12 --base GPT2_FOLDER --stage 3 --c-thought 2 --out OUT

OUT/original is in the format that InternVL was published in, with configuration and code of the folder that is named,
for tools that read no other. The last form imports a checkpoint of the original Coconut (its file of weights and the
folder of the model it started from). Either way the folder is loaded again with plain transformers, and its logits are
compared before it gets its name. With --push-to-hub it is then uploaded, to a repository that is private if it is new.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.evaluation.hub import check_push, push
from coconut.evaluation.result import require_folder
from coconut.evaluation.run import find_checkpoint, require_evaluation_of, require_stage
from coconut.types import CoconutError, ConfigError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="folder that the trainer wrote: RUN/final, RUN/stage_2, or RUN")
    add("--out", type=Path, required=True, help="folder to write; must be new or empty")
    add("--name", help="of the model, for its card (default: the name of OUT)")
    add("--eval", type=Path, nargs="+", default=[], metavar="DIR", help="evaluation folders, for the card's scores")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload OUT to this repository of the Hugging Face hub")
    as_published = "also write OUT/original in InternVL's own format, like this folder of the published model"
    add("--original-internvl", type=Path, metavar="FOLDER", help=as_published)
    original = parser.add_argument_group("a checkpoint of the original Coconut")
    add = original.add_argument
    add("--original", type=Path, metavar="FILE", help="the file that it wrote, checkpoint_N")
    add("--base", metavar="MODEL", help="folder or hub id of the model it started from")
    add("--stage", type=int, metavar="N", help="its stage: (N - 1) // epochs_per_stage for checkpoint_N")
    add("--c-thought", type=int, default=2, help="its c_thought (default: %(default)s)")
    add("--max-latent-stage", type=int, default=4, help="its max_latent_stage (default: %(default)s)")
    add("--method", choices=("coconut", "cot", "no_cot"), default="coconut", help="how it was trained")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        check(arguments)
        difference = run(arguments)
        print(f"exported: {arguments.out} (logits in plain transformers differ by at most {difference:.1g})")
        if arguments.push_to_hub is not None:
            print(f"pushed: {push(arguments.out, arguments.push_to_hub)}")
    except CoconutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    if (arguments.checkpoint is None) == (arguments.original is None):
        raise ConfigError("give either --checkpoint, or --original with --base and --stage")
    if arguments.original is not None:
        missing = [f"--{name}" for name in ("base", "stage") if getattr(arguments, name) is None]
        if missing:
            raise ConfigError(f"--original needs {' and '.join(missing)} too: the file does not say")
        if not arguments.original.is_file():
            raise ConfigError(f"--original {arguments.original} is no file")
        for name, least in (("stage", 0), ("c_thought", 1), ("max_latent_stage", 1)):
            if (value := getattr(arguments, name)) < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; give a number of at least {least}")
        if arguments.eval:
            raise ConfigError("--eval takes evaluations of a --checkpoint: import first, evaluate OUT, export that")
    else:
        checkpoint = find_checkpoint(arguments.checkpoint)
        require_stage(checkpoint)
        for folder in arguments.eval:
            require_evaluation_of(checkpoint, folder)
    if arguments.original_internvl is not None:
        require_original_internvl(arguments)
    require_folder(arguments.out.parent)
    if arguments.out.is_dir() and any(arguments.out.iterdir()):
        raise ConfigError(f"{arguments.out} exists and is not empty; choose another --out, or remove it")
    if arguments.push_to_hub is not None:
        check_push(arguments.push_to_hub)


def require_original_internvl(arguments: argparse.Namespace) -> None:
    from coconut.evaluation.export import read_original_config

    if arguments.original is not None:
        raise ConfigError("--original-internvl goes with --checkpoint; --original imports a model of text")
    read_original_config(arguments.original_internvl)


def run(arguments: argparse.Namespace) -> float:
    # These take seconds to import: not for a typing error, nor for --help.
    from coconut.evaluation.export import export, export_original_internvl, original_stage
    from coconut.evaluation.loaded import load
    from coconut.evaluation.run import log_to_console
    from coconut.model.original import load_original

    log_to_console(False)
    processor = None
    if arguments.original is not None:
        spec = original_stage(arguments.stage, arguments.c_thought, arguments.max_latent_stage, arguments.method)
        model, tokenizer = load_original(arguments.original, arguments.base, spec)
    else:
        loaded = load(find_checkpoint(arguments.checkpoint))
        model, tokenizer, processor = loaded.model.to("cpu"), loaded.tokenizer, loaded.processor
    name = arguments.name or arguments.out.resolve().name
    difference: float = export(model, tokenizer, processor, arguments.out, name=name, evaluations=arguments.eval)
    if arguments.original_internvl is not None:
        difference = max(difference, export_original_internvl(arguments.out, arguments.original_internvl))
    return difference


if __name__ == "__main__":
    sys.exit(main())
