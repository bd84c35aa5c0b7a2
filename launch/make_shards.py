"""Shard a JSON or JSONL data file: WebDataset tars and an index, which training reads.

    python launch/make_shards.py data.json --out shards/train
    python launch/make_shards.py data.jsonl --out shards/train --image-root images --shard-size 256 --workers 8
    python launch/make_shards.py data.json --out shards/train --part 3/8     on several machines (slurm/make_shards.sh)
    python launch/make_shards.py --out shards/train --verify           check everything; exit code 1 on any difference
    python launch/make_shards.py --out shards/train --inspect 6        print samples, draw their tiles
    python launch/make_shards.py --out tars --index-only               index WebDataset tars that are there already

A run that was killed goes on where it was, with --force too: give the same command again. The format is described in
docs/data_format.md.
Exit codes: 0 done; 1 --verify found a difference; 2 the input or the disk is at fault, one line on stderr says how.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coconut.data.shard_build import Built

# Run from a clone, the project's root is not on the path, but this folder is.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", nargs="?", type=Path, help="JSON list of records, or JSONL (the README shows one)")
    add("--out", type=Path, required=True, help="folder of the shards; made if missing")
    add("--image-root", type=Path, help="folder of the images (default: that of the data file)")
    add("--shard-size", type=float, default=64.0, metavar="MB", help="size of a tar (default: %(default)g)")
    add("--max-side", type=int, metavar="N", help="encode larger images anew, N pixels on the longer side")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one a core)")
    add("--skip-bad", action="store_true", help="leave bad records out and list them in OUT/bad_samples.jsonl")
    add("--parent-paths", action="store_true", help="allow '..' in the paths of images")
    add("--force", action="store_true", help="make anew and replace what is there, once all is made")
    add("--part", metavar="I/N", help="make only the I-th of N parts (I from 1); the last to end completes the set")
    add("--index-only", action="store_true", help="write the index of the tars in --out, and leave them as they are")
    add("--tokenizer", metavar="PATH", help="also count tokens with the tokenizer of this model folder or hub id")
    add("--verify", action="store_true", help="check all checksums, all members and all images of --out")
    add("--inspect", nargs="?", type=int, const=4, metavar="N", help="print N samples (default: 4), draw their tiles")
    add("--image-size", type=int, default=448, help="side of a tile that --inspect draws (default: %(default)s)")
    add("--max-num-patches", type=int, default=12, help="tiles of an image that it draws (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.data is not None and arguments.index_only:
        parser.error("--index-only indexes the tars in --out; it takes no data file")
    actions = (arguments.data, arguments.index_only, arguments.tokenizer, arguments.verify, arguments.inspect)
    if not any(action not in (None, False) for action in actions):
        parser.error("name a data file, or one of --verify, --inspect, --index-only, --tokenizer for shards in --out")
    if arguments.data is None:
        for name in ("image_root", "max_side", "part"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name.replace('_', '-')} goes with a data file")
    arguments.share = None
    if arguments.part is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", arguments.part)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            parser.error(f"--part is {arguments.part}; write I/N with I from 1 to N, as 3/8")
        if arguments.force:
            parser.error("--force throws away what other parts have made; remove the old set first")
        arguments.share = int(found[1]) - 1, int(found[2])
    for name in ("workers", "inspect", "image_size", "max_num_patches"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


class Progress:
    """Says how far a phase is: a bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.phase, self.began, self.said_at = "", 0.0, 0.0

    def __call__(self, phase: str, done: int, tasks: int, samples: int) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self.phase, self.began, self.said_at = phase, now, now
        if now - self.said_at < (0.2 if self.is_terminal else 10.0):
            return
        self.said_at = now
        seconds = max(now - self.began, 1e-9)
        line = f"{phase}: {done} of {tasks}, {samples:,} samples, {samples / seconds:,.0f}/s"
        line += f", {seconds * (tasks - done) / done:.0f} s left"
        if self.is_terminal:
            filled = round(20 * done / tasks)
            print(f"\r[{'#' * filled}{'.' * (20 - filled)}] {line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = parse_arguments(argv)
    # Imported here, so that --help answers at once.
    from coconut.types import CoconutError

    progress = Progress()
    try:
        return run(arguments, progress)
    except (CoconutError, OSError) as error:
        progress.clear()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        progress.clear()
        print("stopped; give the same command again to go on", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace, progress: Progress) -> int:
    """Make, count, check and show, as far as asked for."""
    out = arguments.out
    if arguments.data is not None:
        make(arguments, progress)
    if arguments.index_only:
        index(arguments, progress)
    if arguments.tokenizer:
        from coconut.data.token_counts import count_tokens
        from coconut.utils.tokenizer import load_tokenizer

        path = count_tokens(out, load_tokenizer(arguments.tokenizer), n_workers=arguments.workers, say=progress)
        progress.clear()
        print(f"tokens of {arguments.tokenizer}: {path}")
    if arguments.verify:
        from coconut.data.shard_verify import verify_shards

        differences = verify_shards(out, n_workers=arguments.workers, say=progress)
        progress.clear()
        if differences:
            for line in differences:
                print(f"difference: {line}", file=sys.stderr)
            return 1
        print("verified: every checksum, every sample, every image")
    if arguments.inspect is not None:
        from coconut.data.image import ImageProcessor
        from coconut.data.shard_inspect import inspect_shards

        processor = ImageProcessor(arguments.image_size, arguments.max_num_patches)
        print(inspect_shards(out, arguments.inspect, processor, out / "inspect.png"))
    return 0


def make(arguments: argparse.Namespace, progress: Progress) -> None:
    """Data file -> shards."""
    from coconut.data.shard_build import BuildOptions, build_shards

    options = BuildOptions(arguments.shard_size, arguments.max_side, arguments.skip_bad, arguments.parent_paths)
    built = build_shards(
        arguments.data,
        arguments.out,
        options,
        image_root=arguments.image_root,
        n_workers=arguments.workers,
        force=arguments.force,
        share=arguments.share,
        say=progress,
    )
    progress.clear()
    if built.is_share:
        print(f"{arguments.out}: part {arguments.part} is made, {built.samples} samples in {built.shards} shards")
        return
    if built.was_complete:
        print(f"{arguments.out} is complete already")
    elif built.kept:
        print(f"{arguments.out}: went on; {built.kept} shards were whole already")
    report(arguments.out, built)


def index(arguments: argparse.Namespace, progress: Progress) -> None:
    """Tars -> their index."""
    from coconut.data.shard_reindex import index_shards

    built, unread = index_shards(
        arguments.out, skip_bad=arguments.skip_bad, n_workers=arguments.workers, say=progress
    )  # fmt: skip
    progress.clear()
    report(arguments.out, built)
    print(f"members read: json, txt and images{not_read(unread)}")


def report(out: Path, built: Built) -> None:
    print(f"{out}: {built.samples} samples in {built.shards} shards")
    if built.skipped:
        print(f"{built.skipped} bad samples were skipped; {out / 'bad_samples.jsonl'} names each with its reason")


def not_read(unread: Counter[str]) -> str:
    kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(unread.items()))
    return f"; not read: {kinds}" if kinds else ""


if __name__ == "__main__":
    sys.exit(main())
