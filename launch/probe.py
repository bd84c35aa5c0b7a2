"""Are the thoughts used, and what is in them? Changes a model's thoughts in many ways and makes a page of what happens.

    python launch/probe.py --checkpoint RUN/final --data data/arrow_maze/shards/test --out RUN/probe

OUT/index.html    what was found: a causal table, swaps, a linear probe, the logit lens, attention on the picture
OUT/probe.json    every number on the page
OUT/causal.png    the figure alone

What each change does is in docs/probe.md. One process; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.evaluation.result import require_folder
from coconut.evaluation.run import find_checkpoint, require_thoughts
from coconut.types import CoconutError, ConfigError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder that the trainer wrote: RUN/final, RUN/stage_2, or RUN")
    add("--data", type=Path, required=True, help="folder of shards, or JSON or JSONL file")
    add("--out", type=Path, required=True, help="folder to write")
    add("--image-root", type=Path, help="folder of a JSON file's images (default: the folder of the file)")
    add("--limit", type=int, default=1000, help="only the first so many samples (default: %(default)s)")
    add("--batch-size", type=int, default=100, help="questions at once (default: %(default)s)")
    add("--max-new-tokens", type=int, default=64, help="cut a text there (default: %(default)s)")
    add("--seed", type=int, default=0, help="of noise, donors and orders (default: %(default)s)")
    add("--num-threads", type=int, help="CPU threads (default: torch's choice, or OMP_NUM_THREADS)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        page = probe(arguments)
    except CoconutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"probe: {page}")
    return 0


def probe(arguments: argparse.Namespace) -> Path:
    """Check what a user can mistype, then load and probe."""
    for name in ("limit", "batch_size", "max_new_tokens", "num_threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give a number of at least 1")
    if not arguments.data.exists():
        raise ConfigError(f"data {arguments.data} does not exist")
    checkpoint = find_checkpoint(arguments.checkpoint)
    require_thoughts(checkpoint)
    require_folder(arguments.out)
    # These take seconds to import: not for a typing error, nor for --help.
    import torch

    from coconut.evaluation.probe_page import verdict
    from coconut.evaluation.probe_run import probe_checkpoint
    from coconut.evaluation.run import log_to_console

    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    log_to_console(True)
    numbers = probe_checkpoint(
        checkpoint,
        arguments.data,
        arguments.out,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        image_root=arguments.image_root,
        say=lambda line: print(line, flush=True),
    )
    print("\n".join(verdict(numbers)))
    page: Path = arguments.out / "index.html"
    return page


if __name__ == "__main__":
    sys.exit(main())
