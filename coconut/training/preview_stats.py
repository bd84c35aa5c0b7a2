"""Distributions of sizes, and how evenly a plan spreads cost over ranks. All from the index, no tar opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.data.plan import BALANCES, EpochPlan
from coconut.training.preview import PreviewInputs

_BINS = 24
_MOST_STEPS = 2000  # of a plan that are looked at, spread evenly


@dataclass(frozen=True)
class Histogram:
    """How often each size occurs."""

    name: str
    edges: list[float]  # one more than counts
    counts: list[int]
    mean: float
    median: float
    p95: float
    largest: float


@dataclass(frozen=True)
class Balance:
    """How even the micro-batches of a plan are that run at the same time."""

    name: str
    is_used: bool  # whether the configuration asks for it
    ratio_mean: float  # costliest rank over the mean of ranks, mean over micro-steps
    ratio_p95: float
    padding: float  # share of a batch's cells, prompts aligned at their ends
    samples: float  # in a micro-batch, mean
    steps: int  # optimizer steps of an epoch


def histograms(preview: PreviewInputs) -> list[Histogram]:
    """Of patches, tokens, steps of reasoning."""
    reader, processor = preview.train.reader, preview.inputs.encoder.image_processor
    n = len(preview.train)
    columns = {"tokens": preview.train.costs_N, "written steps": reader.n_steps[:n]}
    if processor is not None and len(reader.index.images):
        columns = {"patches": reader.index.patches(processor.num_patches)[:n]} | columns
    return [_histogram(name, np.asarray(values)) for name, values in columns.items()]


def balances(preview: PreviewInputs, ranks: int) -> list[Balance]:
    """Of the run's own kind of plan for `ranks` ranks, and of the other kinds beside it."""
    config, split, geometry = preview.config, preview.train, preview.geometry(ranks)
    used = config.balance
    found = []
    try:
        for kind in BALANCES:
            config.update(balance=kind)
            plan = preview.inputs.train_loader(0, 0, 0, geometry, ranks).plan
            found.append(_balance(plan, kind, kind == used, split.costs_N, split.tails_N, ranks))
    finally:
        config.update(balance=used)
    return found


def _histogram(name: str, values: NDArray[Any]) -> Histogram:
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.integer) and high - low < _BINS:
        edges = np.arange(low, high + 2) - 0.5  # a bar for each number
    else:
        edges = np.linspace(low, max(high, low + 1), _BINS + 1)
    counts, edges = np.histogram(values, bins=edges)
    return Histogram(
        name,
        edges.tolist(),
        counts.tolist(),
        float(values.mean()),
        float(np.median(values)),
        float(np.quantile(values, 0.95)),
        high,
    )


def _balance(
    plan: EpochPlan, name: str, is_used: bool, costs_N: NDArray[Any], tails_N: NDArray[Any], ranks: int
) -> Balance:
    prompts_N = costs_N - tails_N
    ratios: list[float] = []
    tokens = cells = n_slots = n_samples = 0.0
    chosen = np.unique(np.linspace(0, len(plan) - 1, min(_MOST_STEPS, len(plan))).astype(int)).tolist()
    for step in chosen:
        slots = plan.step(step)
        cost = np.array([costs_N[slot].sum() for slot in slots]).reshape(-1, ranks)
        ratios += (cost.max(axis=1) / np.maximum(cost.mean(axis=1), 1e-9)).tolist()
        for slot in slots:
            n_slots, n_samples = n_slots + 1, n_samples + len(slot)
            if len(slot):
                tokens += costs_N[slot].sum()
                cells += len(slot) * (prompts_N[slot].max() + tails_N[slot].max())
    return Balance(
        name,
        is_used,
        float(np.mean(ratios)),
        float(np.quantile(ratios, 0.95)),
        1 - tokens / cells,
        n_samples / n_slots,
        len(plan),
    )
