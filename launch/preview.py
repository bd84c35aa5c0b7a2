"""Shows what the model will see at a stage: tiles, text with thoughts, what is asked for, lengths and cost.

    python launch/preview.py --config args/X.yaml --stage 2             micro-batches of stage 2, here and as a page
    python launch/preview.py --config args/X.yaml --stats --ranks 8     sizes, and how evenly 8 ranks would be loaded
    python launch/preview.py --config args/X.yaml train_data_path=data/mine/train

DIR/index.html    one page that needs no other file: a picture of each sample's tiles, its tokens coloured by kind

The batches come out of the code that trains; weights are not loaded. In text without colour, [..] stands for tokens
without words and {..} for what the loss is taken of.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.config import load_config
from coconut.types import CoconutError, ConfigError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="args/demo.yaml", help="run configuration (default: %(default)s)")
    add("--stage", type=int, help="stage of the curriculum (default: 1, or 0 where there is no other)")
    add("--samples", type=int, default=6, help="rows to show (default: %(default)s)")
    add("--output", type=Path, default=Path("preview"), metavar="DIR", help="folder of the page (default: %(default)s)")
    add("--stats", action="store_true", help="also the distributions of sizes, and the balance of the plan")
    add("--ranks", type=int, default=1, help="ranks that the plan is made for (default: %(default)s)")
    add("overrides", nargs="*", metavar="key=value", help="configuration keys, as for launch/train.py")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when configuration or data are at fault (one error on stderr says how)."""
    arguments = build_parser().parse_intermixed_args(argv)
    try:
        for name in ("samples", "ranks"):
            if getattr(arguments, name) < 1:
                raise ConfigError(f"--{name} is {getattr(arguments, name)}; give a number of at least 1")
        config = load_config(arguments.config, overrides=arguments.overrides)
        page = preview(config, arguments)
    except (CoconutError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\npage: {page}")
    return 0


def preview(config: Any, arguments: argparse.Namespace) -> Path:
    """Collect, print, and write the page."""
    # These take seconds to import: not for a typing error, nor for --help.
    from coconut.training.preview import open_preview, preview_batches
    from coconut.training.preview_page import terminal_stats, terminal_text, write_preview
    from coconut.training.preview_stats import balances, histograms

    opened = open_preview(config)
    stage = arguments.stage if arguments.stage is not None else min(1, opened.stages.stages[-1])
    batches = list(preview_batches(opened, stage, arguments.samples, arguments.ranks))
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns
    print(terminal_text(batches, colour=is_terminal, width=width))
    sizes, plans = (histograms(opened), balances(opened, arguments.ranks)) if arguments.stats else ([], [])
    if arguments.stats:
        print("\n" + terminal_stats(sizes, plans, arguments.ranks))
    title = f"{config.name}, stage {stage}"
    return write_preview(arguments.output, title, batches, sizes, plans, arguments.ranks)


if __name__ == "__main__":
    sys.exit(main())
