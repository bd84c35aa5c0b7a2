"""Packing by cost: each sample once, full slots, even groups, the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.data import packing
from coconut.data.plan import make_plan
from coconut.types import DataError


def sizes_of(kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    tails = rng.lognormal(4.3, 0.7, n).round() + 1
    if kind == "equal":
        return np.full(n, 20.0), np.full(n, 10.0)
    if kind == "text":
        return rng.lognormal(4, 0.6, n).round() + 1, tails
    patches = rng.choice([0, 1, 3, 5, 7, 9, 13], n, p=[0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.2])
    if kind == "giant":
        patches[0] = 4000
    return 256.0 * patches + 50, tails


@settings(max_examples=1000, deadline=None)
@given(
    kind=st.sampled_from(["equal", "text", "images", "giant"]),
    n=st.integers(1, 300),
    group=st.sampled_from([1, 2, 3, 8, 64]),
    rounds=st.integers(1, 4),
    batch=st.integers(1, 9),
    epoch=st.integers(0, 2),
    length=st.none() | st.integers(1, 400),
)
def test_each_sample_once_and_no_rank_differs_in_its_steps(kind, n, group, rounds, batch, epoch, length) -> None:
    prompts, tails = sizes_of(kind, n)
    slots = group * rounds
    common = {"seed": 3, "slots": slots, "samples_per_step": slots * batch, "lengths": (prompts, tails)}
    common |= {"samples_per_epoch": length, "balance": "cost", "group": group}
    plan = make_plan(prompts + tails, epoch=epoch, **common)
    steps = [plan.step(step) for step in range(len(plan))]
    assert all(len(step) == slots for step in steps), "every rank runs slots / ranks micro-batches in every step"
    row = np.concatenate([slot for step in steps for slot in step])
    assert len(row) == (length or n)
    if length is None:
        assert sorted(row) == list(range(n))
    if len(row) >= len(plan) * slots:
        assert all(len(slot) for step in steps for slot in step), "an empty slot where samples are left"
    again = make_plan(prompts + tails, epoch=epoch, **common)
    assert np.array_equal(again.order, plan.order)


def test_slots_that_run_together_cost_the_same_and_pad_little() -> None:
    prompts, tails = sizes_of("images", 20_000)
    costs = prompts + tails

    def measured(balance: str) -> tuple[float, float, float]:
        plan = make_plan(
            costs, seed=0, epoch=0, slots=32, samples_per_step=128, balance=balance, group=8, lengths=(prompts, tails)
        )
        steps = [plan.step(step) for step in range(len(plan))]
        cost = np.array([[costs[slot].sum() for slot in step] for step in steps]).reshape(-1, 8)
        ratio = cost.max(axis=1) / cost.mean(axis=1)
        slots = [slot for step in steps for slot in step if len(slot)]
        padded = sum(len(slot) * (prompts[slot].max() + tails[slot].max()) for slot in slots)
        return float(ratio.mean()), float(np.quantile(ratio, 0.95)), 1 - costs.sum() / padded

    mean, p95, padding = measured("cost")
    assert mean < 1.03 and p95 < 1.08 and padding < 0.04
    mean, p95, padding = measured("none")
    assert mean > 1.2 and padding > 0.2


def test_a_label_that_says_nothing_of_length_is_spread_as_by_a_shuffle() -> None:
    """On data sorted by label, for many seeds: the variance of a label's share of a step."""
    prompts, tails = sizes_of("images", 8_000)
    is_first = np.arange(8_000) < 2_000
    variances, expected = [], []
    for seed in range(6):
        plan = make_plan(
            prompts + tails, seed=seed, epoch=0, slots=32, samples_per_step=128, balance="cost", group=8,
            lengths=(prompts, tails),
        )  # fmt: skip
        steps = [plan.samples(step) for step in range(len(plan))]
        variances += [(is_first[step].mean() - 0.25) ** 2 for step in steps]
        expected += [0.25 * 0.75 / len(step) for step in steps]
    assert np.mean(variances) < 1.2 * np.mean(expected)


def test_a_costlier_sample_than_the_budget_has_a_slot_of_its_own() -> None:
    assert packing.cut(np.array([9.0, 2.0, 2.0, 1.0]), 4.0).tolist() == [0, 1, 3, 4]
    assert packing.cut(np.full(6, 0.1), 0.3).tolist() == [0, 3, 6], "0.1 + 0.1 + 0.1 > 0.3"


def test_unknown_balance_and_uneven_groups_are_named() -> None:
    with pytest.raises(DataError, match="balance is 'even'; choose none, count, cost"):
        make_plan(np.ones(3), seed=0, epoch=0, slots=1, samples_per_step=1, balance="even")
    with pytest.raises(DataError, match="group is 3; it must divide the 4 slots"):
        make_plan(np.ones(3), seed=0, epoch=0, slots=4, samples_per_step=4, balance="cost", group=3)
