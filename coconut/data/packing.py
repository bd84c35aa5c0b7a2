"""Samples packed into slots of like length up to a cost budget, and slots gathered into steps; pure.

    samples --like_length_order--> a row in which neighbours are of like length
            --cut--> slots: consecutive samples that together cost at most the budget
            --arrange--> steps: each of mixed length, made of groups of slots of about equal cost

A *group* is as many slots as there were ranks at the first start: what runs at the same time. Slots of a large pool
are sorted by cost and each group takes neighbours, so what runs together costs the same; a budget need not be met
exactly for that. A step takes groups of different cost, and a group slots of all the lengths its cost allows.

Shapes: N samples, K slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Lengths that differ by less than this factor count as equal, so that a slot mixes what differs by a word only.
LIKE_LENGTH = 1.03
#: Like samples that are sorted by prompt once more: batches are aligned where the prompt ends.
_BLOCK = 256


def like_length_order(prompt_N: NDArray, tail_N: NDArray) -> Ints:
    """Positions sorted so that neighbours have prompts and tails of like length, the longest first; stable."""
    bucket = np.floor(np.log(np.maximum(prompt_N + tail_N, 1)) / np.log(LIKE_LENGTH)).astype(np.int64)
    order = np.argsort(-bucket, kind="stable")
    block = np.arange(len(order)) // _BLOCK
    prompt = np.floor(np.log(np.maximum(prompt_N[order], 1)) / np.log(LIKE_LENGTH)).astype(np.int64)
    return order[np.lexsort((-prompt, block))]


def cut(costs_N: Floats, budget: float) -> Ints:
    """Ends of slots of consecutive samples that cost at most `budget`; a costlier sample has a slot of its own.

    Returns:
        int64 [K + 1], from 0 to N.
    """
    total = np.concatenate([[0.0], np.cumsum(costs_N)])
    # The end of a slot that begins at each place; sums differ in their last digits, which must not decide.
    ends = np.searchsorted(total, total[:-1] + budget * (1 + 1e-9), side="right") - 1
    following = np.maximum(ends, np.arange(1, len(total))).tolist()
    starts, place, n_samples = [0], 0, len(costs_N)
    while place < n_samples:
        place = following[place]
        starts.append(place)
    return np.array(starts, dtype=np.int64)


def fill(starts: Ints, costs_N: Floats, multiple: int) -> Ints:
    """More slots, until their number is a multiple: the last ones, which hold most samples, are cut anew, smaller.

    Slots stay empty only where samples are fewer than slots.
    """
    n_slots = len(starts) - 1
    missing = -n_slots % multiple
    n_recut = min(n_slots, 64 * (missing + 1))
    first = int(starts[n_slots - n_recut])
    n_new, n_samples = n_recut + missing, len(costs_N) - first
    total = np.concatenate([[0.0], np.cumsum(costs_N[first:])])
    inner = np.searchsorted(total, total[-1] * np.arange(1, n_new) / n_new, side="left")
    if n_samples >= n_new:  # at least one sample each: neither before its turn nor so late that none is left
        turn = np.arange(1, n_new)
        inner = np.maximum.accumulate(np.maximum(inner, turn) - turn) + turn
        inner = np.minimum(inner, n_samples - n_new + turn)
    else:
        inner = np.minimum(np.arange(1, n_new), n_samples)
    return np.concatenate([starts[: n_slots - n_recut + 1], first + inner, [len(costs_N)]])


def arrange(starts: Ints, costs_N: Floats, lengths_N: NDArray, slots: int, group: int, draws_K: NDArray) -> Ints:
    """The slots of every step.

    Args:
        starts: where each slot begins, and the end; the number of slots is a multiple of `slots`.
        costs_N, lengths_N: of the samples, slot after slot.
        slots: slots a step.
        group: slots that run at the same time; divides `slots`.
        draws_K: a random number for each slot; all that is random here.

    Returns:
        int64 [steps, slots], slots of the pool; within a step from the costliest to the cheapest.
    """
    n_slots = len(starts) - 1
    cost_K = _sums(costs_N, starts)
    length_K = _sums(lengths_N.astype(np.float64), starts) / np.maximum(np.diff(starts), 1)
    per_step, n_steps = slots // group, n_slots // slots
    # Blocks of slots of like cost; within a block, each group gets short and long ones.
    by_cost = np.lexsort((draws_K, -cost_K))
    n_groups = n_slots // group
    n_blocks = min(max(n_groups // 64, 64), n_groups)
    group_at = np.arange(n_slots) // group
    block_of_group = np.arange(n_groups) * n_blocks // n_groups
    block = block_of_group[group_at]
    by_length = by_cost[np.lexsort((length_K[by_cost], block))]
    size = np.bincount(block_of_group, minlength=n_blocks)  # groups in each block
    first = np.concatenate([[0], np.cumsum(size * group)])[:-1]
    within = np.arange(n_slots) - first[block]
    groups = by_length[np.lexsort((within, within % size[block], block))].reshape(n_groups, group)
    # A step takes one group from each stratum of cost.
    order = groups.reshape(per_step, n_steps, group)
    steps = np.concatenate([stratum[np.argsort(draws_K[stratum[:, 0]], kind="stable")] for stratum in order], axis=1)
    return np.take_along_axis(steps, np.argsort(-cost_K[steps], axis=1, kind="stable"), axis=1)


def _sums(values_N: Floats, starts: Ints) -> Floats:
    total = np.concatenate([[0.0], np.cumsum(values_N)])
    return total[starts[1:]] - total[starts[:-1]]


def budget_for(costs_N: Floats, mean_samples: float) -> float:
    """The least budget at which slots hold `mean_samples` samples on average, of samples in packing order."""
    most_slots = max(int(len(costs_N) / mean_samples), 1)
    low, high = 0.0, float(costs_N.sum())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if len(cut(costs_N, middle)) - 1 <= most_slots else (middle, high)
    return high
