"""Shard a JSON or JSONL data file: WebDataset tars and an index, which training reads.

python launch/make_shards.py data.json --out shards/train
python launch/make_shards.py data.json --out shards/train --image-root images --shard-size 256
python launch/make_shards.py --out shards/train --verify
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coconut.types import Sample

# Run from a clone, the project's root is not on the path, but this folder is.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", type=Path, help="JSON list of records, or JSONL (the README shows one)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards; made, or its set replaced")
    parser.add_argument("--image-root", type=Path, help="folder of the images (default: that of the data file)")
    parser.add_argument("--shard-size", type=float, default=64.0, metavar="MB", help="size of a tar (default: 64)")
    parser.add_argument(
        "--verify", action="store_true", help="check all checksums and decode all images (of --out alone without data)"
    )
    arguments = parser.parse_args(argv)
    if arguments.data is None and not arguments.verify:
        parser.error("name a data file, or --verify to check the shards in --out")
    if arguments.data is None and arguments.image_root is not None:
        parser.error("--image-root goes with a data file")
    return arguments


def with_progress(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Pass samples on, and say on a terminal how many have passed."""
    said_at = 0.0
    for number, sample in enumerate(samples):
        if sys.stderr.isatty() and time.monotonic() - said_at > 0.5:
            said_at = time.monotonic()
            print(f"\rsharding: {number} of {len(samples)} samples ", end="", file=sys.stderr, flush=True)
        yield sample
    if said_at:
        print("\r\033[K", end="", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when the input or the disk is at fault (one line on stderr says how)."""
    arguments = parse_arguments(argv)
    # Imported here, so that --help answers at once.
    from coconut.data.sample import read_samples
    from coconut.data.shards import ShardReader, write_shards
    from coconut.types import DataError

    try:
        if arguments.data is not None:
            samples = read_samples(arguments.data, image_root=arguments.image_root)
            write_shards(with_progress(samples), arguments.out, arguments.shard_size)
        reader = ShardReader(arguments.out)
        print(f"{arguments.out}: {len(reader)} samples in {len(reader.index.shards)} shards")
        if arguments.verify:
            reader.verify()
            print("verified: every checksum, every sample, every image")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
