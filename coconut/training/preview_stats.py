"""Distributions of sizes, and how evenly a plan spreads cost over ranks. All from the index, no tar opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.data.balance import Balance, measure_balance
from coconut.data.plan import BALANCES
from coconut.training.preview import PreviewInputs

_BINS = 24


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
class KindOfPlan:
    """A value of ``balance``, and what its plan gives."""

    name: str
    is_used: bool  # whether the configuration asks for it
    balance: Balance
    steps: int  # optimizer steps of an epoch


def histograms(preview: PreviewInputs) -> list[Histogram]:
    """Of patches, tokens, steps of reasoning."""
    reader, processor = preview.train.reader, preview.inputs.encoder.image_processor
    columns: dict[str, NDArray[Any]] = {"tokens": preview.train.tokens_N, "written steps": reader.n_steps()}
    patches = reader.patches(processor.num_patches) if processor is not None else np.zeros(1)
    if patches.any():
        columns = {"patches": patches} | columns
    return [_histogram(name, np.asarray(values)) for name, values in columns.items()]


def balances(preview: PreviewInputs, ranks: int) -> list[KindOfPlan]:
    """Of the run's own kind of plan for `ranks` ranks, and of the other kinds beside it."""
    config, split, geometry = preview.config, preview.train, preview.geometry(ranks)
    used = config.balance
    found = []
    try:
        for kind in BALANCES:
            config.update(balance=kind)
            plan = preview.inputs.train_loader(0, 0, 0, geometry, ranks).plan
            measured = measure_balance(plan, split.tokens_N, split.tails_N, ranks)
            found.append(KindOfPlan(kind, kind == used, measured, len(plan)))
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
