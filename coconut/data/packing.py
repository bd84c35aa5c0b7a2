"""Samples packed into the slots of every step of an epoch, after a pattern; pure.

    samples --sorted by length--> blocks between two quantiles --a sample of each block--> slots --> steps

A *group* is as many slots as there were ranks at the first start: what runs at the same time. The pattern (`pattern`)
says which quantiles of length each slot of a few steps holds. A block holds one sample for each step made after the
pattern's step; slots take from their blocks samples whose prompts rank alike, since batches are aligned where the
prompt ends. What is left of differences in cost is ranked, so that slots of a group are all a little above or below.

Shapes: N samples, Q slots made after one slot of the pattern.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from coconut.data.pattern import Pattern, find_pattern

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Slots and groups of a pattern, about; enough kinds of slots to choose from, few enough to search in seconds.
_PATTERN_SLOTS, _PATTERN_GROUPS, _PATTERN_GROUP = 64, 32, 16
#: Lengths and prompts that differ by less than one part in so many count as equal.
LIKE_LENGTH, LIKE_PROMPT = 200, 400
#: Samples that stand for a block, from the longest to the shortest prompt.
_RANKS = 3
#: A budget leaves this much of the samples that it could hold: the search needs room.
ROOM = 0.87


def like(values: NDArray, fraction: int) -> Ints:
    """Classes of values that differ by about 1 / `fraction`, so that what differs by a few tokens is shuffled."""
    edges, edge, most = [], 1, float(values.max(initial=1.0))
    while edge <= most:
        edges.append(edge)
        edge += max(edge // fraction, 1)
    return np.searchsorted(np.array(edges), values, side="right")


def like_length_order(lengths_N: NDArray) -> Ints:
    """Positions sorted by length, the longest first; those of like length keep their order."""
    return np.argsort(-like(lengths_N, LIKE_LENGTH), kind="stable")


def pattern_for(
    costs_N: Floats,
    prompts_N: NDArray,
    lengths_N: NDArray,
    *,
    n_steps: int,
    samples: int,
    slots: int,
    group: int,
    budget: float,
) -> Pattern:
    """The pattern of steps of `samples` samples, of the whole data set.

    Large groups and steps are made of repeats of a smaller pattern; small steps are searched several at a time.
    """
    if samples <= slots:  # a sample a slot, and some slots empty
        return Pattern(
            1, slots // group, group, samples, tuple((item,) if item < samples else () for item in range(slots))
        )
    group_small, groups_small = _divisor(group, _PATTERN_GROUP), _divisor(slots // group, _PATTERN_GROUPS)
    repeats = slots // (group_small * groups_small)
    steps = max(-(-_PATTERN_GROUPS // groups_small), -(-_PATTERN_SLOTS // (groups_small * group_small)))
    steps = min(steps, n_steps)
    n_items = steps * -(-samples // repeats)
    order = like_length_order(lengths_N)
    bounds = np.arange(n_items + 1) * len(order) // n_items
    first, size = bounds[:-1], np.maximum(np.diff(bounds), 1)  # an empty block is that of the next sample
    items = order[first + (size - 1) // 2]
    block = np.searchsorted(bounds, np.arange(len(order)), side="right")
    by_prompt = order[np.lexsort((-prompts_N[order], block))]
    tails_N = lengths_N - prompts_N
    ranks = []
    for rank in range(_RANKS):
        at = by_prompt[first + size * (2 * rank + 1) // (2 * _RANKS)]
        ranks.append((tuple(prompts_N[at].tolist()), tuple(tails_N[at].tolist())))
    return find_pattern(
        tuple(costs_N[items].tolist()),
        tuple(ranks),
        steps=steps,
        groups=groups_small,
        group=group_small,
        repeats=repeats,
        budget=budget * float(lengths_N.sum() / costs_N.sum()),  # of rows, which the search counts in tokens
    )


def cut(costs_N: Floats, budget: float) -> int:
    """The number of slots, if consecutive samples are put into them up to a budget."""
    total = np.concatenate([[0.0], np.cumsum(costs_N)])
    # The end of a slot that begins at each place; sums differ in their last digits, which must not decide.
    ends = np.searchsorted(total, total[:-1] + budget * (1 + 1e-9), side="right") - 1
    following = np.maximum(ends, np.arange(1, len(total))).tolist()
    n_slots, place = 0, 0
    while place < len(costs_N):
        place, n_slots = following[place], n_slots + 1
    return n_slots


def budget_for(costs_N: Floats, mean_samples: float) -> float:
    """The least budget at which slots of consecutive samples hold `mean_samples` on average."""
    most_slots = max(int(len(costs_N) / mean_samples), 1)
    low, high = 0.0, float(costs_N.sum())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if cut(costs_N, middle) <= most_slots else (middle, high)
    return high


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`; if that is less than half of `most`, the next one, or the number itself."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    largest = max(divisor for divisor in divisors if divisor <= most)
    return largest if 2 * largest >= most or largest == number else min(d for d in divisors if d > largest)


def pack(
    pattern: Pattern,
    costs_N: Floats,
    prompts_N: NDArray,
    lengths_N: NDArray,
    *,
    n_steps: int,
    slots: int,
    group: int,
    hashed: Callable[[int, str], NDArray[np.uint64]],
) -> tuple[Ints, Ints]:
    """Pack all samples into `n_steps` steps.

    Args:
        costs_N, prompts_N, lengths_N: of the samples, in an order that is random: equals keep it.
        n_steps, slots, group: steps to make, slots a step, slots that run together.
        hashed: makes so many random numbers, by a name; all that is random here.

    Returns:
        int64 [N], samples slot after slot, step after step; and int64 [n_steps * slots], their numbers. Within a step
        the costliest slot comes first.
    """
    # The larger steps of the pattern come first, so that copies of it hold all samples, if some stay a sample short.
    per_step = pattern.groups * pattern.group
    items_of_kind = np.array([len(slot) for slot in pattern.slots]).reshape(pattern.steps, per_step).sum(axis=1)
    kind_of_step = np.argsort(-items_of_kind, kind="stable")[np.arange(n_steps) % pattern.steps]
    kind_of_step = kind_of_step[np.argsort(hashed(n_steps, "steps"), kind="stable")]
    per_kind = np.bincount(kind_of_step, minlength=pattern.steps)
    repeats = slots // per_step
    members = _members(pattern, np.repeat(per_kind * repeats, per_step), len(costs_N))
    blocks = _blocks(pattern, members, prompts_N, lengths_N)

    width = group // pattern.group  # slots of a group made after one slot of the pattern
    units = repeats // width  # of `width` slots, in a step, made after one slot of the pattern
    copies: list[tuple[Ints, Ints]] = []  # samples of each pattern slot's copies, copy after copy; where they go
    counts, costs = np.zeros((n_steps, slots), np.int64), np.zeros((n_steps, slots))
    for number, present in enumerate(members):
        kind, place = divmod(number, per_step)
        n_copies = present.shape[1]
        samples = np.zeros(present.shape, np.int64)
        for row, item in enumerate(pattern.slots[number]):
            samples[row, present[row]] = blocks[item]
        cost = np.where(present, costs_N[samples], 0.0).sum(axis=0)
        by_cost = np.argsort(-cost, kind="stable")
        # Units of like cost go to a step at random, the same for all slots of a group.
        unit = np.argsort(hashed(n_copies // width, f"group\0{number // pattern.group}"), kind="stable")
        unit = np.repeat(unit, width)
        step = np.flatnonzero(kind_of_step == kind)[unit // units]
        slot = place * repeats + unit % units * width + np.arange(n_copies) % width
        counts[step, slot] = present[:, by_cost].sum(axis=0)
        costs[step, slot] = cost[by_cost]
        copies.append((samples.T[by_cost][present.T[by_cost]], step * slots + slot))
    return _written(copies, counts, costs)


def _written(copies: list[tuple[Ints, Ints]], counts: Ints, costs: Floats) -> tuple[Ints, Ints]:
    """All samples in one row and the sizes of slots, step after step, the costliest slot of each first.

    Args:
        copies: samples of some slots, slot after slot, and these slots' places in the steps x slots.
        counts, costs: [steps, slots], of each slot.
    """
    n_steps, slots = counts.shape
    order = np.argsort(-costs, axis=1, kind="stable")
    sizes: Ints = np.take_along_axis(counts, order, axis=1).reshape(-1)
    begins = np.empty(n_steps * slots, np.int64)
    begins[(order + slots * np.arange(n_steps)[:, None]).reshape(-1)] = np.cumsum(sizes) - sizes
    row = np.empty(int(sizes.sum()), np.int64)
    for samples, place in copies:
        size = counts.reshape(-1)[place]
        row[np.repeat(begins[place] - (np.cumsum(size) - size), size) + np.arange(len(samples))] = samples
    return row, sizes


def _members(pattern: Pattern, copies: Ints, n_samples: int) -> list[NDArray[np.bool_]]:
    """Which copies of each pattern slot hold a sample of each of its items: bool [items, Q] for each slot.

    All do, if the samples are enough; else some copies of slots of several items do without one of them.
    """
    n_items = np.array([len(slot) for slot in pattern.slots])
    missing = int((n_items * copies).sum()) - n_samples
    spare = np.maximum(n_items - 1, 0) * copies
    if missing > spare.sum():  # hardly a sample a slot: the last slots of steps go without
        filled = n_items.reshape(pattern.steps, -1) > 0
        is_last = filled & (np.cumsum(filled, axis=1) == filled.sum(axis=1, keepdims=True))
        spare = copies * is_last.reshape(-1)
    shares = np.diff(missing * np.cumsum(spare) // max(int(spare.sum()), 1), prepend=0).tolist()
    members = []
    for size, number, short in zip(n_items.tolist(), copies.tolist(), shares, strict=True):
        present = np.ones((size, number), bool)
        if short:
            whole, rest = divmod(short, number)
            present[:whole] = False
            column = np.arange(rest) * number // max(rest, 1)
            present[whole + np.arange(rest) % max(size - whole, 1), column] = False
        members.append(present)
    return members


def _blocks(pattern: Pattern, members: list[NDArray[np.bool_]], prompts_N: NDArray, lengths_N: NDArray) -> list[Ints]:
    """The samples of each item: consecutive in length, sorted by prompt."""
    sizes = np.zeros(pattern.n_items, np.int64)
    for items, present in zip(pattern.slots, members, strict=True):
        sizes[list(items)] = present.sum(axis=1)
    order = like_length_order(lengths_N)
    prompt = like(prompts_N, LIKE_PROMPT)[order]
    ends = np.cumsum(sizes)
    blocks = []
    for first, last in zip(ends - sizes, ends, strict=True):
        blocks.append(order[first:last][np.argsort(-prompt[first:last], kind="stable")])
    return blocks
