"""Bad samples of all ranks: named once in RUN/bad_samples.jsonl, and bounded.

each rank's batches --counts, in the step's own all-reduce--> all ranks know how many, and how many are new
new ones            --gathered, only then-->                  rank 0 appends a line for each
too large a share   -->                                       DataError on every rank, with the first of them
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from coconut.data.bad_samples import BadSample
from coconut.types import DataError
from coconut.utils.distributed import all_gather_object, is_main_process, on_main_first
from coconut.utils.logging import get_logger

logger = get_logger(__name__)

BAD_SAMPLES_FILE = "bad_samples.jsonl"
#: The fraction is taken of at least so many samples: one bad sample among the first ten says little.
FEWEST_SAMPLES = 1000
MOST_LISTED = 10


class BadSampleReport:
    """The report of one run; the same on every rank.

    Args:
        run_dir: takes the file.
        max_fraction: largest share of bad samples among all that were asked for.
    """

    def __init__(self, run_dir: Path, max_fraction: float) -> None:
        self.path, self.max_fraction = run_dir / BAD_SAMPLES_FILE, max_fraction
        self.named: dict[tuple[str, str, str], BadSample] = {}  # by split, shard and key

    def load(self) -> None:
        """Take over what this run named before it was stopped; every rank must call it."""
        for row in on_main_first(self._rows):
            split = row.pop("split")
            bad = BadSample(**row)
            self.named[split, bad.shard, bad.key] = bad

    def unnamed(self, found: Iterable[BadSample], split: str = "train") -> list[BadSample]:
        """Those that the report does not name yet, each once."""
        return list(
            {(bad.shard, bad.key): bad for bad in found if (split, bad.shard, bad.key) not in self.named}.values()
        )

    def name(self, found: Sequence[BadSample], split: str = "train") -> None:
        """Name what the ranks found; every rank must call it, also one that found nothing."""
        new = self.unnamed((bad for ours in all_gather_object(list(found)) for bad in ours), split)
        self.named |= {(split, bad.shard, bad.key): bad for bad in new}
        if new and is_main_process():
            for bad in new:
                logger.warning("%s data: left out %s", split, bad)
            with self.path.open("a") as file:
                file.writelines(json.dumps({"split": split, **asdict(bad)}) + "\n" for bad in new)

    def check(self, n_bad: int, n_good: int, split: str = "train") -> None:
        """Raises: DataError: on every rank, past the share that is allowed."""
        n_seen = n_bad + n_good
        if n_bad <= self.max_fraction * max(n_seen, FEWEST_SAMPLES):
            return
        listed = [str(bad) for (of_split, *_), bad in self.named.items() if of_split == split]
        more = f"; and {len(listed) - MOST_LISTED} more" if len(listed) > MOST_LISTED else ""
        raise DataError(
            f"{n_bad} of {n_seen} samples of the {split} data could not be used, more than max_bad_fraction = "
            f"{self.max_fraction} allows (of at least {FEWEST_SAMPLES}): {'; '.join(listed[:MOST_LISTED])}{more}. "
            f"All are in {self.path}; mend the data, or raise max_bad_fraction"
        )

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a line cut off by a crash names its sample anew
        if whole != text:
            self.path.write_text(whole)
        return [json.loads(line) for line in whole.splitlines()]
