"""The plan: each sample once a pass, equal and balanced slots, the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.data.order import pass_order
from coconut.data.plan import deal, make_plan
from coconut.types import DataError

sizes = st.integers(1, 200)
PINNED = [5, 0, 4, 6, 3, 1, 7, 2]  # of seed 0, pass 0, 8 samples


@given(n=sizes, slots=st.integers(1, 9), step_size=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_each_sample_exactly_once_an_epoch(n: int, slots: int, step_size: int, seed: int, epoch: int) -> None:
    costs = np.random.default_rng(n).lognormal(size=n)
    plan = make_plan(costs, seed=seed, epoch=epoch, slots=slots, samples_per_step=step_size)
    assert len(plan) == -(-n // step_size)
    seen: list[int] = []
    for step in range(len(plan)):
        hands = plan.step(step)
        counts = [len(hand) for hand in hands]
        assert len(hands) == slots
        assert max(counts) - min(counts) <= 1
        assert 1 <= sum(counts) <= step_size
        assert sorted(np.concatenate(hands)) == sorted(plan.samples(step))
        seen += np.concatenate(hands).tolist()
    assert sorted(seen) == list(range(n))


@given(n=st.integers(1, 60), length=st.integers(1, 130), step_size=st.integers(1, 20))
def test_each_sample_exactly_once_a_pass_in_epochs_of_any_length(n: int, length: int, step_size: int) -> None:
    n_epochs = -(-3 * n // length)
    row: list[int] = []
    for epoch in range(n_epochs):
        plan = make_plan(np.ones(n), seed=5, epoch=epoch, slots=2, samples_per_step=step_size, samples_per_epoch=length)
        assert len(plan) == -(-length // step_size)
        epoch_samples = np.concatenate([plan.samples(step) for step in range(len(plan))])
        assert len(epoch_samples) == length
        row += epoch_samples.tolist()
    for start in range(0, 3 * n, n):
        assert sorted(row[start : start + n]) == list(range(n))


@given(n=sizes, slots=st.integers(2, 8), step_size=st.integers(1, 40))
def test_samples_of_a_step_do_not_depend_on_the_slots(n: int, slots: int, step_size: int) -> None:
    costs = np.arange(n)
    one = make_plan(costs, seed=0, epoch=1, slots=1, samples_per_step=step_size)
    many = make_plan(costs, seed=0, epoch=1, slots=slots, samples_per_step=step_size)
    for step in range(len(one)):
        assert set(one.step(step)[0]) == set(np.concatenate(many.step(step)))


def test_steps_of_an_epoch_are_of_like_size() -> None:
    plan = make_plan(np.ones(5000), seed=0, epoch=0, slots=2, samples_per_step=32)
    counts = {len(plan.samples(step)) for step in range(len(plan))}
    assert counts == {31, 32}  # and no last step of 8


def test_order_differs_by_seed_and_pass_and_is_pinned() -> None:
    assert pass_order(8, 0, 0).tolist() == PINNED, "a resumed run would see other samples than it was to see"
    orders = {tuple(pass_order(50, seed, number)) for seed in range(3) for number in range(3)}
    assert len(orders) == 9
    with pytest.raises(ValueError, match="read-only"):
        pass_order(8, 0, 0)[0] = 1


def test_shuffle_is_fair() -> None:
    """Mean place of a sample over many passes is the middle, and neighbours are parted."""
    places = np.stack([np.argsort(pass_order(20, seed, 0)) for seed in range(2000)])
    assert np.abs(places.mean(axis=0) - 9.5).max() < 0.6
    order = pass_order(10_000, 1, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_dealing_balances_cost() -> None:
    rng = np.random.default_rng(0)
    costs = rng.choice([1, 3, 5, 7, 13], size=4000) * 256.0 + rng.integers(20, 200, size=4000)
    plan = make_plan(costs, seed=0, epoch=0, slots=8, samples_per_step=64)

    def unevenness(order_of) -> float:
        worst = []
        for step in range(len(plan)):
            sums = [costs[hand].sum() for hand in order_of(step)]
            worst.append(max(sums) / np.mean(sums))
        return float(np.mean(worst))

    dealt = unevenness(plan.step)
    random = unevenness(lambda step: np.array_split(plan.samples(step), 8))
    assert dealt < 1.06
    assert random > 1.25


def test_fewer_samples_than_slots_leaves_slots_empty() -> None:
    hands = deal(np.array([4, 2]), np.arange(5.0), 4)
    assert [hand.tolist() for hand in hands] == [[4], [2], [], []]
    assert all(hand.dtype == np.int64 for hand in hands)


@pytest.mark.parametrize("change", [{"slots": 0}, {"samples_per_step": 0}, {"samples_per_epoch": 0}, {"epoch": -1}])
def test_numbers_out_of_range_are_named(change) -> None:
    settings = {"seed": 0, "epoch": 0, "slots": 1, "samples_per_step": 1} | change
    with pytest.raises(DataError, match=f"{next(iter(change))} is "):
        make_plan(np.ones(3), **settings)
    with pytest.raises(DataError, match="zero samples"):
        make_plan(np.ones(0), seed=0, epoch=0, slots=1, samples_per_step=1)
    with pytest.raises(IndexError, match="step 3 of an epoch of 3"):
        make_plan(np.ones(3), seed=0, epoch=0, slots=1, samples_per_step=1).step(3)
