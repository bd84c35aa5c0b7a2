"""Intervals and tests of means over samples: bootstrap, and a paired comparison of two models on the same questions.

Everything is drawn from a seed, so the same scores give the same interval to the last digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, fsum

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_BLOCK = 2_000_000  # drawn indices held at one time


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def estimate(values: Sequence[float] | NDArray[np.float64], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of per-sample values; the interval holds the middle 95 % of the means of resampled data sets.

    Values that are all alike leave an interval without width: the bootstrap knows only what it has seen. For a share
    near 0 or 1 Wilson's interval (`score.wilson_interval`) is the sounder one.
    """
    values_N = np.asarray(values, dtype=np.float64)
    if not len(values_N):
        return Estimate(0.0, 0.0, 0.0, 0)
    means_R = resampled_means(values_N, seed, resamples)
    low, high = np.quantile(means_R, [0.025, 0.975])
    return Estimate(fsum(values_N) / len(values_N), float(low), float(high), len(values_N))


def resampled_means(values_N: NDArray[np.float64], seed: int, resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """Means of `resamples` draws with replacement, each as large as the data."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(values_N))
    parts = [
        values_N[generator.integers(len(values_N), size=(min(rows, resamples - first), len(values_N)))].mean(axis=1)
        for first in range(0, resamples, rows)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Paired:
    """Two ways of answering the same questions, compared question by question."""

    difference: Estimate  # second minus first
    only_first: int  # questions that only the first got right
    only_second: int
    p_value: float  # that so uneven a split, or a more uneven one, comes of a fair coin (exact McNemar test)


def compare_paired(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> Paired:
    """Compare right and wrong answers to the same questions, given in the same order.

    Raises:
        ValueError: the two are not equally many.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} answers cannot be paired with {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    difference = estimate([float(b) - float(a) for a, b in zip(first, second, strict=True)], seed)
    return Paired(difference, only_first, only_second, mcnemar_exact(only_first, only_second))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact test on the questions that the two answer differently."""
    n = only_first + only_second
    if n == 0:
        return 1.0
    tail = sum(comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)
