"""Sets mixed by weight: exact shares, every sample in turn, and nothing that hangs on ranks or on what came before."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.data.order import MixturePart, epoch_order, share_out
from coconut.data.plan import BALANCES, make_plan
from coconut.types import DataError

FEW, MANY = 30, 1000
#: A small set that is wanted often, a large one, and one of a lower weight.
PARTS = [MixturePart(0, FEW, 2.0), MixturePart(FEW, MANY, 1.5), MixturePart(FEW + MANY, 200, 0.5)]
N = FEW + MANY + 200


def part_of(order: np.ndarray) -> np.ndarray:
    return np.searchsorted([part.first for part in PARTS], order, side="right") - 1


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=9), length=st.integers(1, 10**7))
def test_shares_add_up_and_are_within_one_of_the_exact_ones(weights: list[int], length: int) -> None:
    counts = share_out(weights, length)
    assert sum(counts) == length
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count * sum(weights) - length * weight) < sum(weights)


def test_weights_are_the_decimal_numbers_that_were_written() -> None:
    assert share_out([0.7, 0.2, 0.1], 1000) == [700, 200, 100]
    assert share_out([0.1] * 3, 10) == [4, 3, 3]


@pytest.mark.parametrize("length", [400, 401, 1230])
def test_every_epoch_holds_the_same_share_of_each_set(length: int) -> None:
    expected = share_out([2, 1.5, 0.5], length)
    for epoch in range(5):
        order = epoch_order(PARTS, seed=1, epoch=epoch, length=length)
        assert np.bincount(part_of(order)).tolist() == expected


def test_small_sets_repeat_in_rounds_and_large_ones_rotate_until_all_was_seen() -> None:
    length = 400  # 200, 150 and 50 samples of the sets
    row = np.concatenate([epoch_order(PARTS, seed=1, epoch=epoch, length=length) for epoch in range(21)])
    few, many, rest = (row[part_of(row) == number] for number in range(3))
    rounds = few[: len(few) // FEW * FEW].reshape(-1, FEW)
    assert len(rounds) == 21 * 200 // FEW
    assert all(sorted(one) == list(range(FEW)) for one in rounds), "each round holds each sample once"
    assert len({tuple(one) for one in rounds}) == len(rounds), "and is shuffled anew"
    assert sorted(many[:MANY]) == list(range(FEW, FEW + MANY)), "a pass takes 6 2/3 epochs"
    assert sorted(many[MANY : 2 * MANY]) == list(range(FEW, FEW + MANY))
    assert max(Counter(rest.tolist()).values()) - min(Counter(rest.tolist()).values()) <= 1


def test_every_stretch_of_an_epoch_holds_its_share() -> None:
    order = epoch_order(PARTS, seed=1, epoch=3, length=4000)
    stretches = part_of(order).reshape(-1, 40)
    found = np.array([np.bincount(stretch, minlength=3) for stretch in stretches])
    assert abs(found - [20, 15, 5]).max() <= 1  # at random, the standard deviations are 3.2, 3.1 and 2.1
    assert len({tuple(stretch) for stretch in stretches}) == len(stretches), "but not in a fixed pattern"


def test_order_hangs_on_seed_and_epoch_alone_and_is_pinned() -> None:
    parts = [MixturePart(0, 3, 1.0), MixturePart(3, 9, 2.0)]
    pinned = epoch_order(parts, seed=0, epoch=1, length=9).tolist()
    assert pinned == [5, 8, 2, 11, 1, 9, 6, 8, 0], "a resumed run would see other samples than it was to see"
    others = [epoch_order(PARTS, seed=s, epoch=e, length=400).tolist() for s, e in ((0, 1), (0, 2), (1, 1))]
    assert all(a != b for a, b in pairwise(others)) and others[0] != others[2]
    assert others[0] == epoch_order(PARTS, seed=0, epoch=1, length=400).tolist()


def test_two_sets_of_one_size_are_not_shuffled_alike() -> None:
    order = epoch_order([MixturePart(0, 50), MixturePart(50, 50)], seed=0, epoch=0, length=100)
    assert order[order < 50].tolist() != (order[order >= 50] - 50).tolist()


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("slots", [4, 8])
def test_plans_of_a_mixture_hold_its_samples_whatever_the_balance(balance: str, slots: int) -> None:
    draw = np.random.default_rng(0)
    tails, prompts = draw.integers(5, 60, N).astype(float), draw.choice([20.0, 276.0, 1556.0], N)
    prompts[:FEW] *= 3  # the small set is the costly one
    plan = make_plan(
        prompts + tails, seed=1, epoch=2, slots=slots, samples_per_step=4 * slots, samples_per_epoch=400,
        balance=balance, group=2, lengths=(prompts, tails), parts=PARTS,
    )  # fmt: skip
    dealt = np.concatenate([slot for step in range(len(plan)) for slot in plan.step(step)])
    assert sorted(dealt) == sorted(epoch_order(PARTS, seed=1, epoch=2, length=400))
    assert np.bincount(part_of(dealt)).tolist() == [200, 150, 50]


def test_packing_is_made_for_the_sizes_that_the_weights_give() -> None:
    """A tenth of the data is long and makes nine tenths of the epoch."""
    prompts = np.concatenate([np.full(100, 1000.0), np.full(900, 100.0)])
    plan = make_plan(
        prompts, seed=0, epoch=0, slots=8, samples_per_step=32, samples_per_epoch=1000, balance="cost", group=2,
        lengths=(prompts, np.zeros(1000)), parts=[MixturePart(0, 100, 9.0), MixturePart(100, 900, 1.0)],
    )  # fmt: skip
    slots = [slot for step in range(len(plan)) for slot in plan.step(step)]
    assert np.mean([len(slot) for slot in slots]) == pytest.approx(4, rel=0.05)
    cost = np.array([prompts[slot].sum() for slot in slots]).reshape(-1, 2)
    assert (cost.max(axis=1) / cost.mean(axis=1)).mean() < 1.1
    cells = sum(len(slot) * prompts[slot].max() for slot in slots)
    assert 1 - cost.sum() / cells < 0.08


@pytest.mark.parametrize(
    ("parts", "length", "said"),
    [
        ([], 5, "zero samples"),
        ([MixturePart(0, 0)], 5, "zero samples"),
        ([MixturePart(0, 4), MixturePart(4, 0)], 5, "set 1 of the mixture, of 0 samples"),
        ([MixturePart(0, 4, 1.0), MixturePart(4, 4, 0.01)], 5, "weight 0.01, has a share of 0 in an epoch of 5"),
    ],
)
def test_a_set_without_a_share_is_an_error(parts: list[MixturePart], length: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        epoch_order(parts, seed=0, epoch=0, length=length)
