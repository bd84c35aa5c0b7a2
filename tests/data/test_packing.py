"""Packing by cost: each sample once, full slots, even groups, the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coconut.data import packing, pattern
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


@pytest.fixture
def short_search():
    """Few moves: these tests ask for what holds after any search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pattern, "MOVES_PER_SLOT", 2)
        pattern.find_pattern.cache_clear()
        yield
    pattern.find_pattern.cache_clear()


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["equal", "text", "images", "giant"]),
    n=st.integers(1, 300),
    balance=st.sampled_from(["cost", "cost", "count", "none"]),
    group=st.sampled_from([1, 2, 3, 8, 61, 64]),
    rounds=st.integers(1, 4),
    batch=st.integers(1, 9),
    epoch=st.integers(0, 2),
    length=st.none() | st.integers(1, 400),
)
@pytest.mark.slow
def test_each_sample_once_and_no_rank_differs_in_its_steps(
    short_search, kind, n, balance, group, rounds, batch, epoch, length
) -> None:
    prompts, tails = sizes_of(kind, n)
    slots = group * rounds
    common = {"seed": 3, "slots": slots, "samples_per_step": slots * batch, "lengths": (prompts, tails)}
    common |= {"samples_per_epoch": length, "balance": balance, "group": group}
    plan = make_plan(prompts + tails, epoch=epoch, **common)
    steps = [plan.step(step) for step in range(len(plan))]
    assert all(len(step) == slots for step in steps), "every rank runs slots / ranks micro-batches in every step"
    assert all(sum(map(len, step)) for step in steps), "a step without a sample has no gradient"
    row = np.concatenate([slot for step in steps for slot in step])
    assert len(row) == (length or n)
    if length is None:
        assert sorted(row) == list(range(n))
    if len(row) >= len(plan) * slots:
        assert all(len(slot) for step in steps for slot in step), "an empty slot where samples are left"
    again = make_plan(prompts + tails, epoch=epoch, **common)
    assert np.array_equal(again.order, plan.order)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 60), length=st.integers(1, 130), slots=st.integers(1, 6), batch=st.integers(1, 5))
def test_each_sample_once_a_pass_in_epochs_of_any_length(short_search, n, length, slots, batch) -> None:
    prompts, tails = sizes_of("images", n)
    row = []
    for epoch in range(-(-2 * n // length)):
        plan = make_plan(
            prompts + tails, seed=5, epoch=epoch, slots=slots, samples_per_step=slots * batch, samples_per_epoch=length,
            balance="cost", lengths=(prompts, tails),
        )  # fmt: skip
        # An epoch that ends in the middle of a pass is packed on its own: compare sets of samples with the row's.
        plain = make_plan(prompts, seed=5, epoch=epoch, slots=1, samples_per_step=1, samples_per_epoch=length)
        assert sorted(plan.order) == sorted(plain.order)
        row += plain.order.tolist()
    assert sorted(row[:n]) == sorted(row[n : 2 * n]) == list(range(n))


@pytest.mark.slow
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


@pytest.mark.parametrize(("group", "rounds", "batch"), [(8, 4, 4), (1, 4, 4)])
def test_composition_of_steps_is_a_shuffles(group: int, rounds: int, batch: int) -> None:
    """On data sorted by label: variance of a label's share and of mean length, at one rank too."""
    n = 20_000
    prompts, tails = sizes_of("images", n)
    costs = prompts + tails
    slots = group * rounds
    shares, lengths, correlations = [], [], []
    for seed in range(2):
        plan = make_plan(
            costs, seed=seed, epoch=0, slots=slots, samples_per_step=slots * batch, balance="cost", group=group,
            lengths=(prompts, tails),
        )  # fmt: skip
        steps = [plan.samples(step) for step in range(len(plan))]
        per_step = n / len(plan)
        mean = np.array([costs[step].mean() for step in steps])
        lengths.append(mean.var() / (costs.var() / per_step))
        for label in range(10):
            share = np.array([(step * 10 // n == label).mean() for step in steps])
            shares.append(((share - 0.1) ** 2).mean() / (0.1 * 0.9 / per_step))
            correlations.append(np.corrcoef(share, mean)[0, 1])
    assert np.mean(shares) < 1.2
    assert np.mean(lengths) < 1.2
    assert np.sqrt(np.mean(np.square(correlations))) < 1.7 * len(plan) ** -0.5, "more than chance"


@pytest.mark.slow
def test_slots_of_samples_of_one_length_are_alike() -> None:
    plan = make_plan(np.ones(4096), seed=0, epoch=0, slots=32, samples_per_step=128, balance="cost", group=8)
    assert {len(slot) for step in range(len(plan)) for slot in plan.step(step)} == {4}


def test_a_pass_is_another_shuffle() -> None:
    prompts, tails = sizes_of("images", 2_000)
    mates = []
    for epoch in range(2):
        plan = make_plan(
            prompts + tails, seed=0, epoch=epoch, slots=8, samples_per_step=32, balance="cost", lengths=(prompts, tails)
        )
        mates.append({frozenset(slot.tolist()) for step in range(len(plan)) for slot in plan.step(step)})
    assert len(mates[0] & mates[1]) < 0.1 * len(mates[0])


def test_a_budget_cuts_consecutive_samples() -> None:
    assert packing.cut(np.array([9.0, 2.0, 2.0, 1.0]), 4.0) == 3, "a costlier sample has a slot of its own"
    assert packing.cut(np.full(6, 0.1), 0.3) == 2, "0.1 + 0.1 + 0.1 > 0.3"


def test_unknown_balance_and_uneven_groups_are_named() -> None:
    with pytest.raises(DataError, match="balance is 'even'; choose none, count, cost"):
        make_plan(np.ones(3), seed=0, epoch=0, slots=1, samples_per_step=1, balance="even")
    with pytest.raises(DataError, match="group is 3; it must divide the 4 slots"):
        make_plan(np.ones(3), seed=0, epoch=0, slots=4, samples_per_step=4, balance="cost", group=3)
