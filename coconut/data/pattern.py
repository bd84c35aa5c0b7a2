"""The packing pattern: which quantiles of length each micro-batch of a few consecutive steps holds; pure.

    costs, prompts and tails at X quantiles --find_pattern--> the quantiles of each slot

A *pattern* is the plan of a miniature: a few steps whose samples are the quantiles ("items") of the data set, the
longest first. `packing` then gives every step of the epoch the samples of one of these steps: samples between the
same two quantiles are alike, so what holds for the miniature holds for each step. Three aims pull in different
directions, and the search settles between them:

    balance      slots that run together cost the same
    padding      items of a slot are of like length
    composition  each step has its share of every length, as by a shuffle or better

The search is threshold accepting (Dueck and Scheuer 1990, simulated annealing without an exponential): plain
arithmetic and a fixed generator, so that every machine finds the same pattern.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import fsum  # correctly rounded, unlike sum(), whose digits depend on the version of Python
from statistics import pvariance

#: Moves tried for each slot of a pattern, and at most: some 3 s.
MOVES_PER_SLOT, MOST_MOVES = 1000, 300_000
#: Excess cost of the costliest slot of a group, and padding, that weigh as much as one unit of composition.
_BALANCE_SCALE, _PADDING_SCALE = 0.02, 0.018
#: Weight of the excess, padding included.
_PADDED = 0.3
#: Excess above which a group weighs so much more: for the tail, not the mean.
_WORST, _WORST_WEIGHT = 0.04, 20.0
#: Weight of a step's variance of shares, of mean length and of number of samples, each as a multiple of a shuffle's.
_COMPOSITION = 0.5
#: Weight of cost above the budget, in mean slots.
_BUDGET = 100.0
#: Standard deviation of the number of samples of a step that weighs as much as a shuffle's variance of shares.
_NUMBER = 0.1
#: Length classes whose shares are held even.
_CLASSES = 10
#: First threshold, over the number of slots; falls to 0.
_THRESHOLD = 3.0
#: Part of the search after which composition has its full weight; until then slots find their kinds.
_RAMP = 0.6


@dataclass(frozen=True)
class Pattern:
    """Slots of `steps` steps of `groups` groups of `group` slots, in that order.

    Attributes:
        slots: the items of each slot, ascending: 0 is the longest of `n_items`.
    """

    steps: int
    groups: int
    group: int
    n_items: int
    slots: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=8)  # the epochs of a run share one
def find_pattern(
    costs: tuple[float, ...],
    ranks: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...],
    *,
    steps: int,
    groups: int,
    group: int,
    repeats: int,
    budget: float,
) -> Pattern:
    """Search for a pattern.

    Args:
        costs: of the items, the longest first; at least as many as slots.
        ranks: tokens of the prompt and of what follows it (the tail), for a few samples of each item. A copy of a slot
            holds samples of one rank.
        steps, groups, group: steps of the pattern, groups of a step, slots of a group.
        repeats: a step of the epoch holds each slot of the pattern so often.
        budget: the most tokens that a slot of several samples should take, padding included.
    """
    n_slots, n_items = steps * groups * group, len(costs)
    search = _Search(costs, ranks, steps, groups, group, repeats, budget)
    search.run(min(MOVES_PER_SLOT * n_slots, MOST_MOVES))
    return Pattern(steps, groups, group, n_items, tuple(tuple(sorted(items)) for items in search.items))


class _Search:
    """Slots that are changed two at a time, while their worth is kept up to date."""

    def __init__(
        self,
        costs: Sequence[float],
        ranks: Sequence[tuple[Sequence[float], Sequence[float]]],
        steps: int,
        groups: int,
        group: int,
        repeats: int,
        budget: float,
    ) -> None:
        self.costs, self.ranks = costs, ranks
        lengths = [fsum(values) / len(ranks) for values in zip(*(half for rank in ranks for half in rank), strict=True)]
        self.group, self.per_step, self.steps = group, groups * group, steps
        self.n_slots, self.n_groups, self.n_items = steps * groups * group, steps * groups, len(costs)
        self.total_length = fsum(lengths) or 1.0
        self.ramp = 1.0  # weight of composition
        self.budget, self.mean_length = budget, self.total_length / self.n_slots
        self.random = random.Random(0).random  # its stream is promised not to change

        self.items = self._start()
        self.slot_of = [0] * self.n_items
        for slot, items in enumerate(self.items):
            for item in items:
                self.slot_of[item] = slot
        self.cost = [fsum(costs[item] for item in items) for items in self.items]
        self.padded = [self._padded(items) for items in self.items]
        self.excess = [self._excess(number) for number in range(self.n_groups)]
        self.imbalance = fsum(self.excess) / self.n_groups
        self.padding = fsum(self.padded) / self.total_length - 1

        # Composition: shares of classes, mean length and number of samples, against a shuffle's variance.
        n_mean = self.n_items / steps  # items a step
        self.class_of = [item * _CLASSES // self.n_items for item in range(self.n_items)]
        shares = [self.class_of.count(number) / self.n_items for number in range(_CLASSES)]
        mean_item = self.total_length / self.n_items
        self.deviation = [length - mean_item for length in lengths]
        # What each step has more than its share: of each class, of length, of samples.
        self.surplus = [[-n_mean * share for share in shares] + [0.0, -n_mean] for _ in range(steps)]
        for slot, items in enumerate(self.items):
            self._count(items, self.surplus[slot // self.per_step], 1)
        expected = [n_mean * share * (1 - share) / repeats for share in shares]
        expected += [n_mean * pvariance(lengths) / repeats, (_NUMBER * n_mean) ** 2]
        self.scales = [1 / steps / max(value, 1e-9) for value in expected]
        self.weights = [_COMPOSITION / _CLASSES] * _CLASSES + [_COMPOSITION, _COMPOSITION]
        # The variance of each over steps, as a multiple of what is expected of a shuffle.
        squares = [fsum(values[place] ** 2 for values in self.surplus) for place in range(_CLASSES + 2)]
        self.variances = [square * scale for square, scale in zip(squares, self.scales, strict=True)]

    def _start(self) -> list[list[int]]:
        """Runs of consecutive items of about equal cost, grouped by cost; step by step if a group is one slot."""
        if self.group == 1:  # nothing to balance: begin with even steps
            hands = [list(range(step, self.n_items, self.steps)) for step in range(self.steps)]
            return [run for hand in hands for run in self._runs(hand, self.per_step)]
        runs = self._runs(list(range(self.n_items)), self.n_slots)
        slots: list[list[int]] = [[] for _ in range(self.n_slots)]
        for number in range(self.n_groups):  # dealt to the steps to and fro
            turn, place = divmod(number, self.steps)
            step = place if turn % 2 == 0 else self.steps - 1 - place
            first = step * self.per_step + turn * self.group
            slots[first : first + self.group] = runs[number * self.group : (number + 1) * self.group]
        return slots

    def _runs(self, items: list[int], n_runs: int) -> list[list[int]]:
        """Consecutive runs of at least one item, the costliest first."""
        sums = list(accumulate((self.costs[item] for item in items), initial=0.0))
        bounds, end = [0], 0
        for run in range(1, n_runs):
            end = max(end, bounds[-1] + 1)
            while sums[end] < sums[-1] * run / n_runs and len(items) - end > n_runs - run:
                end += 1
            bounds.append(end)
        bounds.append(len(items))
        runs = [items[first:last] for first, last in pairwise(bounds)]
        return sorted(runs, key=lambda run: -fsum(self.costs[item] for item in run))

    def run(self, moves: int) -> None:
        for move in range(moves):
            threshold = _THRESHOLD / self.n_slots * (1 - move / moves) ** 2
            self.ramp = min(0.01 + move / moves / _RAMP, 1.0)
            exchange = self._draw()
            if exchange is not None:
                self._try(*exchange, threshold)

    def _draw(self) -> tuple[int, int, list[int], list[int]] | None:
        """Two slots and what each gives to the other; None if a slot would be left empty."""
        kind = self.random()
        if kind < 0.1:  # all: slots change their groups
            a, b = int(self.random() * self.n_slots), int(self.random() * self.n_slots)
            return None if a // self.group == b // self.group else (a, b, self.items[a], self.items[b])
        x = int(self.random() * self.n_items)
        reach = 0.12 if self.random() < 0.6 else 1.0  # mostly items of like length
        y = (x + int((2 * self.random() - 1) * reach * self.n_items)) % self.n_items
        a, b = self.slot_of[x], self.slot_of[y]
        if a == b:
            return None
        if kind < 0.4:  # one item moves
            from_a, from_b = [x], []
        elif kind < 0.7:  # two items change places
            from_a, from_b = [x], [y]
        else:  # what is no longer than x, for what is no longer than y (or shorter)
            least = y + (self.random() < 0.5)
            from_a = [item for item in self.items[a] if item >= x]
            from_b = [item for item in self.items[b] if item >= least]
        if len(self.items[a]) - len(from_a) + len(from_b) == 0 or len(self.items[b]) - len(from_b) + len(from_a) == 0:
            return None
        return a, b, from_a, from_b

    def _try(self, a: int, b: int, from_a: list[int], from_b: list[int], threshold: float) -> None:
        """Exchange, unless that makes the whole worse by more than the threshold."""
        new_a = [item for item in self.items[a] if item not in from_a] + from_b
        new_b = [item for item in self.items[b] if item not in from_b] + from_a
        padded_a, padded_b = self._padded(new_a), self._padded(new_b)
        padding = self.padding + (padded_a + padded_b - self.padded[a] - self.padded[b]) / self.total_length
        change = (padding**2 - self.padding**2) / _PADDING_SCALE**2
        change += self._over(padded_a, len(new_a)) + self._over(padded_b, len(new_b))
        change -= self._over(self.padded[a], len(self.items[a])) + self._over(self.padded[b], len(self.items[b]))
        if change > threshold + 2 / self.n_groups:
            return  # beyond what the rest is likely to make good; most moves end here

        moved = fsum(self.costs[item] for item in from_a) - fsum(self.costs[item] for item in from_b)
        self.cost[a] -= moved
        self.cost[b] += moved
        old_padded = self.padded[a], self.padded[b]
        self.padded[a], self.padded[b] = padded_a, padded_b
        group_a, group_b = a // self.group, b // self.group
        excess_a, excess_b = self._excess(group_a), self._excess(group_b)
        imbalance = self.imbalance + (excess_a - self.excess[group_a]) / self.n_groups
        if group_b != group_a:
            imbalance += (excess_b - self.excess[group_b]) / self.n_groups
        change += (imbalance**2 - self.imbalance**2) / _BALANCE_SCALE**2

        step_a, step_b = a // self.per_step, b // self.per_step
        if step_a != step_b:
            surplus_a, surplus_b = self._surplus_after(step_a, step_b, from_a, from_b)
            variances = self._variances_after(step_a, step_b, surplus_a, surplus_b)
            change += self.ramp * fsum(
                weight * (new * new - old * old)
                for weight, new, old in zip(self.weights, variances, self.variances, strict=True)
            )
        if change >= threshold:
            self.cost[a] += moved
            self.cost[b] -= moved
            self.padded[a], self.padded[b] = old_padded
            return
        if step_a != step_b:
            self.surplus[step_a], self.surplus[step_b], self.variances = surplus_a, surplus_b, variances
        self.items[a], self.items[b] = new_a, new_b
        self.padding, self.imbalance = padding, imbalance
        self.excess[group_a], self.excess[group_b] = excess_a, excess_b
        for item in from_a:
            self.slot_of[item] = b
        for item in from_b:
            self.slot_of[item] = a

    def _surplus_after(
        self, step_a: int, step_b: int, from_a: list[int], from_b: list[int]
    ) -> tuple[list[float], list[float]]:
        surplus_a, surplus_b = self.surplus[step_a].copy(), self.surplus[step_b].copy()
        for items, loser, winner in ((from_a, surplus_a, surplus_b), (from_b, surplus_b, surplus_a)):
            self._count(items, loser, -1)
            self._count(items, winner, 1)
        return surplus_a, surplus_b

    def _variances_after(self, step_a: int, step_b: int, surplus_a: list[float], surplus_b: list[float]) -> list[float]:
        return [
            before + scale * (new_a * new_a - old_a * old_a + new_b * new_b - old_b * old_b)
            for before, scale, new_a, old_a, new_b, old_b in zip(
                self.variances,
                self.scales,
                surplus_a,
                self.surplus[step_a],
                surplus_b,
                self.surplus[step_b],
                strict=True,
            )
        ]

    def _padded(self, items: list[int]) -> float:
        row = 0.0
        for prompts, tails in self.ranks:
            row += max([prompts[item] for item in items]) + max([tails[item] for item in items])
        return len(items) * row / len(self.ranks)

    def _over(self, padded: float, n_items: int) -> float:
        """Penalty of a slot above the budget; a single item cannot be split."""
        if n_items == 1 or padded <= self.budget:
            return 0.0
        return _BUDGET * (padded - self.budget) / self.mean_length / self.n_slots

    def _excess(self, number: int) -> float:
        """By how much the costliest slot of a group exceeds its mean, as a fraction; more if above `_WORST`."""
        first, last = number * self.group, (number + 1) * self.group
        costs, padded = self.cost[first:last], self.padded[first:last]
        excess = max(costs) * self.group / (fsum(costs) or 1.0) - 1
        padded_excess = max(padded) * self.group / (fsum(padded) or 1.0) - 1
        return excess + _WORST_WEIGHT * max(excess - _WORST, 0.0) + _PADDED * padded_excess

    def _count(self, items: list[int], surplus: list[float], sign: int) -> None:
        for item in items:
            surplus[self.class_of[item]] += sign
            surplus[-2] += sign * self.deviation[item]
            surplus[-1] += sign
