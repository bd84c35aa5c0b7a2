"""The order in which an epoch takes its samples, of one data set or of several mixed by weight; pure.

    set A: pass 0 | pass 1 | ...      each pass all samples, shuffled anew
    set B: pass 0 | pass 1 | ...
    epoch e: the next c_A samples of A's row and the next c_B of B's, spread evenly over each other

An epoch's ``length`` samples are shared out by weight once: c_A, c_B ... are the same in every epoch, whole numbers
that differ from the exact share by less than one. So epoch e takes the samples e * c to (e + 1) * c of a set's row: a
set smaller than its share begins its next pass, a larger one is gone through over several epochs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coconut.types import DataError


@dataclass(frozen=True)
class MixturePart:
    """One set of a mixture: the samples `first` to `first + size - 1`, with a weight relative to the other parts'."""

    first: int
    size: int
    weight: float = 1.0


def share_out(weights: Sequence[float], length: int) -> list[int]:
    """Whole numbers that add up to `length`, in proportion to `weights`: by the largest remainders, the first on a tie.

    Exact: a weight counts as the decimal number that it is written as.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [length * weight / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda part: counts[part] - quotas[part])  # stable
    for part in by_remainder[: length - sum(counts)]:
        counts[part] += 1
    return counts


def epoch_order(parts: Sequence[MixturePart], *, seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """The samples of an epoch, in the order they are taken: int64 [length].

    Raises:
        DataError: no part, an empty one, or one whose share is less than a sample.
    """
    counts = part_counts(parts, length)
    if len(parts) == 1:
        row = _row(parts[0].size, seed, "", epoch * length, length)
        return parts[0].first + row if parts[0].first else row
    rows, places = [], []
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        rows.append(part.first + _row(part.size, seed, f"\0{number}", epoch * count, count))
        # One sample in each count-th of the epoch: a set keeps its order, and every step has about its share of it.
        within = hashed(count, f"mixture\0{seed}\0{epoch}\0{number}") / 2.0**64
        places.append((np.arange(count) + within) / count)
    return np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]


def part_counts(parts: Sequence[MixturePart], length: int) -> list[int]:
    """Samples of each part in an epoch of `length` samples; raises as `epoch_order` does."""
    if not sum(part.size for part in parts):
        raise DataError("there are zero samples to plan an epoch of")
    counts = share_out([part.weight for part in parts], length)
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if part.size < 1 or count < 1:
            raise DataError(
                f"set {number} of the mixture, of {part.size} samples and weight {part.weight:g}, has a share of "
                f"{count} in an epoch of {length}; it must be at least one sample"
            )
    return counts


def typical_samples(parts: Sequence[MixturePart], length: int) -> NDArray[np.int64] | slice:
    """Samples in the numbers that every epoch has of each part, the same ones for all epochs; a single part, whole."""
    if len(parts) == 1:
        return slice(parts[0].first, parts[0].first + parts[0].size)
    counts = part_counts(parts, length)
    return np.concatenate([p.first + np.arange(n) * p.size // n for p, n in zip(parts, counts, strict=True)])


def _row(size: int, seed: int, salt: str, first: int, count: int) -> NDArray[np.int64]:
    """`count` samples from place `first` on of a set's passes."""
    pieces = []
    for number in range(first // size, -(-(first + count) // size)):
        start = number * size
        pieces.append(pass_order(size, seed, number, salt)[max(first - start, 0) : min(first + count - start, size)])
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@lru_cache(maxsize=2)  # the epochs of one pass follow each other
def pass_order(n_samples: int, seed: int, number: int, salt: str = "") -> NDArray[np.int64]:
    """The order of all samples in pass ``number``: int64 [n_samples], a permutation.

    Sorts by a hash (splitmix64) rather than asking a library's generator, whose streams may change with
    its version: a run that is resumed after an upgrade must see the samples it would have seen.
    """
    order = np.argsort(hashed(n_samples, f"pass-order\0{seed}\0{number}{salt}"), kind="stable")
    order.setflags(write=False)  # it is shared through the cache
    return order


def hashed(n: int, name: str) -> NDArray[np.uint64]:
    """A pseudo-random number for each of 0 .. n-1, by `name` alone."""
    key = hashlib.sha256(name.encode()).digest()
    start = np.uint64(int.from_bytes(key[:8], "big"))
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64
        mixed = start + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
