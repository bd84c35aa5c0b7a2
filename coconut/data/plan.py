"""Which samples each micro-batch of an epoch holds: pure, and known to every rank without a word.

    (costs, seed, epoch, slots, samples_per_step) --make_plan--> EpochPlan
    EpochPlan.step(g) -> one array of sample indices for each of the step's slots

The samples are shuffled once a *pass*; passes follow one another, and an epoch is the next
``samples_per_epoch`` samples of that endless row (by default, a whole pass). So each sample comes exactly
once a pass, whatever the epoch's length. A step takes the next samples of the row and deals them to its
*slots*, the micro-batches that all ranks together run before the optimizer steps: equal counts, give or
take one, and about equal cost. Rank r of W runs the slots s with s % W == r, so neither the samples of a
step nor those of a slot depend on the number of ranks, and a position is two integers: epoch and step.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coconut.types import DataError


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The steps of one epoch; made by `make_plan`.

    Attributes:
        order: int64 [samples of the epoch], indices into the data set, in the order they are taken.
        costs: [samples of the data set], the cost of each.
        slots: micro-batches a step, over all ranks.
        n_steps: optimizer steps of the epoch.
    """

    order: NDArray[np.int64]
    costs: NDArray[np.float64]
    slots: int
    n_steps: int

    def __len__(self) -> int:
        return self.n_steps

    def samples(self, step: int) -> NDArray[np.int64]:
        """All samples of an optimizer step, before they are dealt to slots."""
        if not 0 <= step < self.n_steps:
            raise IndexError(f"step {step} of an epoch of {self.n_steps}")
        # Spread evenly, so that no epoch ends in a step of a few samples with a noisy gradient.
        n_samples = len(self.order)
        return self.order[step * n_samples // self.n_steps : (step + 1) * n_samples // self.n_steps]

    def step(self, step: int) -> list[NDArray[np.int64]]:
        """The samples of each of the step's slots; slots are empty where samples are fewer than slots."""
        return deal(self.samples(step), self.costs, self.slots)


def make_plan(
    costs: NDArray[np.floating] | NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    slots: int,
    samples_per_step: int,
    samples_per_epoch: int | None = None,
) -> EpochPlan:
    """Plan an epoch.

    Args:
        costs: [samples], what each sample costs to train on, in any unit; equal costs are fine.
        seed: draws the order of every pass.
        epoch: counted from 0.
        slots: micro-batches of an optimizer step over all ranks.
        samples_per_step: most samples of an optimizer step over all ranks.
        samples_per_epoch: length of an epoch; None is the whole data set.

    Raises:
        DataError: zero samples, or a number below 1.
    """
    n_samples = len(costs)
    if n_samples == 0:
        raise DataError("there are zero samples to plan an epoch of")
    length = n_samples if samples_per_epoch is None else samples_per_epoch
    for name, value, least in (
        ("epoch", epoch, 0),
        ("slots", slots, 1),
        ("samples_per_step", samples_per_step, 1),
        ("samples_per_epoch", length, 1),
    ):
        if value < least:
            raise DataError(f"{name} is {value}; it must be at least {least}")
    first, last = epoch * length, (epoch + 1) * length  # positions in the row of passes, the last excluded
    pieces = []
    for number in range(first // n_samples, -(-last // n_samples)):
        start = number * n_samples
        order = pass_order(n_samples, seed, number)
        pieces.append(order[max(first - start, 0) : min(last - start, n_samples)])
    return EpochPlan(
        order=pieces[0] if len(pieces) == 1 else np.concatenate(pieces),
        costs=np.asarray(costs, dtype=np.float64),
        slots=slots,
        n_steps=-(-length // samples_per_step),
    )


@lru_cache(maxsize=2)  # the epochs of one pass follow each other
def pass_order(n_samples: int, seed: int, number: int) -> NDArray[np.int64]:
    """The order of all samples in pass ``number``: int64 [n_samples], a permutation.

    Sorts by a hash (splitmix64) rather than asking a library's generator, whose streams may change with
    its version: a run that is resumed after an upgrade must see the samples it would have seen.
    """
    key = hashlib.sha256(f"pass-order\0{seed}\0{number}".encode()).digest()
    start = np.uint64(int.from_bytes(key[:8], "big"))
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64
        mixed = start + (np.arange(n_samples, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    order = np.argsort(mixed, kind="stable")
    order.setflags(write=False)  # it is shared through the cache
    return order


def deal(samples: NDArray[np.int64], costs: NDArray[np.float64], slots: int) -> list[NDArray[np.int64]]:
    """Deal samples to slots: counts equal within one, costs about equal.

    The costliest sample goes first, each to the slot that has cost least so far and is not full.
    """
    smaller, n_larger = divmod(len(samples), slots)
    hands: list[list[int]] = [[] for _ in range(slots)]
    heap = [(0.0, slot) for slot in range(slots)]  # (cost so far, slot) of the slots that are not full
    for sample in samples[np.argsort(-costs[samples], kind="stable")].tolist():
        cost, slot = heapq.heappop(heap)
        hands[slot].append(sample)
        if len(hands[slot]) < smaller + (slot < n_larger):
            heapq.heappush(heap, (cost + float(costs[sample]), slot))
    return [np.array(hand, dtype=np.int64) for hand in hands]
