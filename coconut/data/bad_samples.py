"""Samples that cannot be used: what is known of each on its way from a loader's worker to the run's report.

    read, encode, stage --DataError--> BadSample, in the Batch's extras --> counted over all ranks (`coconut.training`)

A bad sample is left out of its micro-batch, which may become inert; nothing takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from coconut.types import Batch

#: Where a Batch holds its bad samples.
EXTRA = "bad_samples"


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out."""

    shard: str  # file name of the shard, or the data file
    key: str
    reason: str  # of the DataError, without shard and key

    @classmethod
    def from_error(cls, shard: str, key: str, error: Exception) -> BadSample:
        reason = str(error)
        name = PurePath(shard).name  # of several sets, `shard` is a path
        for known in (f"{shard} (key {key})", shard, f"{name} (key {key})", name):
            reason = reason.removeprefix(known).lstrip(",: ")
        return cls(shard, key, reason)

    def __str__(self) -> str:
        return f"{self.shard} (key {self.key}): {self.reason}"


def bad_samples_of(batches: Iterable[Batch]) -> list[BadSample]:
    """All that the batches report; batches of other loaders report none."""
    return [bad for batch in batches for bad in batch.extras.get(EXTRA, ())]
