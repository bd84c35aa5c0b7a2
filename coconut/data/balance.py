"""How evenly a plan spreads cost over ranks, and how much its batches are padded; from the index alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.data.plan import EpochPlan

#: Micro-batches of a plan that are looked at, in whole steps that are spread evenly.
_MOST_SLOTS = 20_000


@dataclass(frozen=True)
class Balance:
    """Of micro-batches that run at the same time, one on each rank."""

    cost_mean: float  # the costliest over the mean, mean over micro-steps
    cost_p95: float
    padding: float  # share of the cells of batches, prompts aligned at their ends
    samples: float  # in a micro-batch, mean


def measure_balance(plan: EpochPlan, tokens_N: NDArray[Any], tails_N: NDArray[Any], ranks: int) -> Balance:
    """Measure a plan on a number of ranks.

    Args:
        plan: of an epoch; has the samples' costs.
        tokens_N, tails_N: tokens of every sample, and those that follow its prompt.
        ranks: each runs one of so many consecutive slots; those missing at a step's end count as empty.
    """
    prompts_N = tokens_N - tails_N
    ratios: list[NDArray[np.float64]] = []
    tokens = cells = n_slots = n_samples = 0.0
    most_steps = min(max(_MOST_SLOTS // plan.slots, 1), len(plan))
    for step in np.unique(np.linspace(0, len(plan) - 1, most_steps).astype(int)).tolist():
        slots = plan.step(step)
        costs = np.zeros((-(-len(slots) // ranks), ranks))
        costs.reshape(-1)[: len(slots)] = [plan.costs[slot].sum() for slot in slots]
        ratios.append(costs.max(axis=1) / np.maximum(costs.mean(axis=1), 1e-9))
        for slot in slots:
            n_slots, n_samples = n_slots + 1, n_samples + len(slot)
            if len(slot):
                tokens += tokens_N[slot].sum()
                cells += len(slot) * (prompts_N[slot].max() + tails_N[slot].max())
    ratio = np.concatenate(ratios)
    return Balance(
        float(ratio.mean()), float(np.quantile(ratio, 0.95)), float(1 - tokens / cells), float(n_samples / n_slots)
    )
