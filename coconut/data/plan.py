"""Which samples each micro-batch of an epoch holds: pure, and known to every rank without a word.

    (costs, seed, epoch, slots, samples_per_step) --make_plan--> EpochPlan
    EpochPlan.step(g) -> one array of sample indices for each of the step's slots

The samples are shuffled once a *pass*; passes follow one another, and an epoch is the next
``samples_per_epoch`` samples of that endless row (by default, a whole pass). So each sample comes exactly
once a pass, whatever the epoch's length. Several sets are mixed by weight, each with a row of its own (`order`).
A step takes the next samples of the row and deals them to its
*slots*, the micro-batches that all ranks together run before the optimizer steps: equal counts, give or
take one, and about equal cost. Rank r of W runs the slots s with s % W == r, so neither the samples of a
step nor those of a slot depend on the number of ranks, and a position is two integers: epoch and step.

With ``balance="cost"`` the number of samples in a slot varies instead (`packing`): slots hold samples of like length,
slots that run at the same time cost the same, and each step has its share of every length.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from coconut.data import packing
from coconut.data.order import MixturePart, epoch_order, hashed, typical_samples
from coconut.types import DataError

BALANCES = ("none", "count", "cost")
#: Samples that are packed together: a bound on memory.
POOL = 1 << 21
#: Samples of which the budget is estimated.
SUBSET = 1 << 17


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The steps of one epoch; made by `make_plan`.

    Attributes:
        order: int64 [samples of the epoch], indices into the data set, in the order they are taken.
        costs: [samples of the data set], the cost of each.
        slots: micro-batches a step, over all ranks.
        n_steps: optimizer steps of the epoch.
        starts: int64 [n_steps * slots + 1], where each slot begins in `order`; None deals a step when it is asked for.
        is_balanced: whether dealing looks at costs.
    """

    order: NDArray[np.int64]
    costs: NDArray[np.float64]
    slots: int
    n_steps: int
    starts: NDArray[np.int64] | None = None
    is_balanced: bool = True

    def __len__(self) -> int:
        return self.n_steps

    def samples(self, step: int) -> NDArray[np.int64]:
        """All samples of an optimizer step, before they are dealt to slots."""
        if not 0 <= step < self.n_steps:
            raise IndexError(f"step {step} of an epoch of {self.n_steps}")
        if self.starts is not None:
            return self.order[self.starts[step * self.slots] : self.starts[(step + 1) * self.slots]]
        # Spread evenly, so that no epoch ends in a step of a few samples with a noisy gradient.
        n_samples = len(self.order)
        return self.order[step * n_samples // self.n_steps : (step + 1) * n_samples // self.n_steps]

    def step(self, step: int) -> list[NDArray[np.int64]]:
        """The samples of each of the step's slots; slots are empty where samples are fewer than slots."""
        samples = self.samples(step)
        if self.starts is not None:
            ends = self.starts[step * self.slots : (step + 1) * self.slots + 1]
            return np.split(samples, ends[1:-1] - ends[0])
        return deal(samples, self.costs, self.slots) if self.is_balanced else np.array_split(samples, self.slots)


def make_plan(
    costs: NDArray[np.floating] | NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    slots: int,
    samples_per_step: int,
    samples_per_epoch: int | None = None,
    balance: str = "count",
    group: int = 1,
    lengths: tuple[NDArray, NDArray] | None = None,
    parts: Sequence[MixturePart] | None = None,
) -> EpochPlan:
    """Plan an epoch.

    Args:
        costs: [samples], what each sample costs to train on, in any unit; equal costs are fine.
        seed: draws the order of every pass.
        epoch: counted from 0.
        slots: micro-batches of an optimizer step over all ranks.
        samples_per_step: most samples of an optimizer step over all ranks; with ``cost``, as many as a budget
            of the costliest sample allows, if this is one a slot.
        samples_per_epoch: length of an epoch; None is the whole data set, or as many samples as all parts hold.
        balance: ``none`` takes samples as they come, ``count`` deals equal counts of about equal cost, ``cost`` packs
            samples of like length up to a cost budget.
        group: with ``cost``, slots that run at the same time; divides `slots`.
        lengths: with ``cost``, tokens of each sample's prompt and of what follows it, [samples] each.
        parts: which samples are mixed, and how; None is all of them as one set.

    Raises:
        DataError: zero samples, a number below 1, a part without a share, or an unknown balance.
    """
    if balance not in BALANCES:
        raise DataError(f"balance is {balance!r}; choose {', '.join(BALANCES)}")
    parts = parts if parts is not None else [MixturePart(0, len(costs))]
    n_samples = sum(part.size for part in parts)
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
    order = epoch_order(parts, seed=seed, epoch=epoch, length=length)
    costs = np.asarray(costs, dtype=np.float64)
    if balance == "cost":
        if slots % group:
            raise DataError(f"group is {group}; it must divide the {slots} slots of a step")
        prompts, tails = lengths if lengths is not None else (costs, np.zeros(len(costs)))
        typical = typical_samples(parts, length)
        return _packed(order, typical, costs, prompts, tails, slots, samples_per_step, group, f"{seed}\0{epoch}")
    return EpochPlan(order, costs, slots, -(-length // samples_per_step), is_balanced=balance == "count")


def _packed(
    row: NDArray[np.int64],
    typical: NDArray[np.int64] | slice,
    costs: NDArray[np.float64],
    prompts: NDArray,
    tails: NDArray,
    slots: int,
    samples_per_step: int,
    group: int,
    name: str,
) -> EpochPlan:
    """The epoch whose samples are `row`, packed pool by pool, after a pattern made for the `typical` samples."""
    lengths = prompts + tails
    budget, samples = budget_of(costs[typical], lengths[typical], slots, samples_per_step)
    n_steps = -(-len(row) // samples)
    pattern = packing.pattern_for(
        costs[typical],
        prompts[typical],
        lengths[typical],
        n_steps=n_steps,
        samples=-(-len(row) // n_steps),
        slots=slots,
        group=group,
        budget=budget,
    )
    orders, sizes = [], []
    n_pools = min(-(-len(row) // POOL), n_steps)
    steps = np.arange(n_pools + 1) * n_steps // n_pools
    bounds = steps * len(row) // n_steps
    for number in range(n_pools):
        pool = row[bounds[number] : bounds[number + 1]]
        packed, counts = packing.pack(
            pattern,
            costs[pool],
            prompts[pool],
            lengths[pool],
            n_steps=int(steps[number + 1] - steps[number]),
            slots=slots,
            group=group,
            hashed=partial(_named_hash, f"{name}\0{number}"),
        )
        orders.append(pool[packed])
        sizes.append(counts)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return EpochPlan(np.concatenate(orders), costs, slots, n_steps, starts)


def budget_of(costs: NDArray[np.float64], lengths: NDArray, slots: int, samples_per_step: int) -> tuple[float, int]:
    """The cost that slots of several samples should not exceed, and the samples of a step; of the data set alone.

    For one sample a slot it is the costliest sample, and steps hold as many as that allows. For more, slots hold so
    many on average.
    """
    some = np.arange(len(costs))[:: -(-len(costs) // SUBSET)]
    some = some[np.argsort(-lengths[some], kind="stable")]
    if samples_per_step > slots:
        return packing.budget_for(costs[some], samples_per_step / slots), samples_per_step
    budget = float(costs.max())
    if samples_per_step < slots:
        return budget, samples_per_step
    return budget, max(int(packing.ROOM * slots * len(some) / packing.cut(costs[some], budget)), slots)


def _named_hash(prefix: str, n: int, name: str) -> NDArray[np.uint64]:
    return hashed(n, f"{prefix}\0{name}")


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
