"""Bootstrap intervals and the paired test, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from coconut.evaluation.stats import compare_paired, estimate, mcnemar_exact


def test_the_interval_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    found = estimate(values)
    half = 1.96 * values.std() / 20  # square root of 400
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert found.n == 400


def test_the_seed_decides_the_interval_and_the_block_size_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50)
    assert estimate(values, seed=1) == estimate(values, seed=1)
    assert estimate(values, seed=1) != estimate(values, seed=2)
    whole = estimate(values, seed=1)
    monkeypatch.setattr("coconut.evaluation.stats._BLOCK", 500)
    assert estimate(values, seed=1) == whole


def test_of_nothing_there_is_no_mean() -> None:
    assert estimate([]).n == 0
    assert (estimate([1.0]).low, estimate([1.0]).high) == (1.0, 1.0)


def test_mcnemar_known_values() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_exact(1, 7) == pytest.approx(2 * 9 / 256)
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(7, 1) == mcnemar_exact(1, 7)
    assert mcnemar_exact(0, 2000) == pytest.approx(0.0, abs=1e-300)


def test_a_paired_comparison_counts_disagreements() -> None:
    first = [True, True, False, False, True]
    second = [True, False, True, True, True]
    found = compare_paired(first, second)
    assert (found.only_first, found.only_second) == (1, 2)
    assert found.difference.mean == pytest.approx(0.2)
    with pytest.raises(ValueError, match="5 answers cannot be paired with 4"):
        compare_paired(first, second[:4])
