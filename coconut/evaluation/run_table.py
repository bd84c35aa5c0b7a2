"""How training went, run by run and stage by stage: scores, rates, and what the machine was busy with.

Rows of metrics.jsonl -> of each stage, sums over its steps, or means weighted by time -> two tables
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from coconut.evaluation.collect import Run
from coconut.evaluation.wording import count, duration, percent

#: Heads of columns and how to write their values; a column that no run has is left out. Two tables: one is too wide.
_PROGRESS: dict[str, Callable[[float], str]] = {
    "Steps": count,
    "Time": duration,
    "Answers right": percent,
    "Validation loss": "{:.3f}".format,
    "Skipped": count,
    "Samples/s": "{:,.1f}".format,
    "Tokens/s": "{:,.0f}".format,
    "Patches/s": "{:,.1f}".format,
}
_MACHINE: dict[str, Callable[[float], str]] = {
    "MFU": percent,
    "Waited for data": percent,
    "Imbalance": "{:.3f}".format,
    "Padding": percent,
    "Memory": lambda value: f"{value / 1e9:.2f} GB",
    "Norm of thoughts": "{:.3g}".format,
    "of embeddings": "{:.3g}".format,
}
#: Columns that are means over the time of a stage, and the metric that each is of.
_MEANS = {"MFU": "mfu", "Waited for data": "loader_wait_share", "Imbalance": "imbalance", "Padding": "padding"}
_MEANS |= {"Norm of thoughts": "thought_norm", "of embeddings": "embedding_norm"}


def stages_tables(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Heads and rows: a row for each stage of each run, broken off or not; no table without a row of training."""
    names = Counter(run.name for run in runs)
    rows = []
    for run in runs:
        name = run.name if names[run.name] == 1 else f"{run.name} ({run.folder.parent.name}/{run.folder.name})"
        rows += [(f"{name}, stage {stage}", values) for stage, values in _stages(run).items()]
    tables = []
    for columns in (_PROGRESS, _MACHINE):
        heads = [head for head in columns if any(head in values for _, values in rows)]
        if heads:
            written = [(name, [columns[h](values[h]) if h in values else "–" for h in heads]) for name, values in rows]
            tables.append(
                {"head": ["Stage", *heads], "rows": [{"name": name, "cells": cells} for name, cells in written]}
            )
    return tables


def _stages(run: Run) -> dict[int, dict[str, float]]:
    """Values by column of each stage that has a row of training."""
    found: dict[int, dict[str, float]] = {}
    before: dict[str, Any] = {"step": 0, "seconds": 0.0, "samples": 0, "tokens": 0}
    for stage, _, _ in run.stage_bounds:
        rows = [row for row in run.of_kind("train") if row["stage"] == stage]
        if rows:
            found[stage] = _one(run, stage, rows, before)
            before = rows[-1]
    return found


def _one(run: Run, stage: int, rows: list[dict[str, Any]], before: dict[str, Any]) -> dict[str, float]:
    def gained(name: str) -> float | None:
        end, start = rows[-1].get(name), before.get(name)
        return None if end is None or start is None else float(end - start)

    seconds = gained("seconds")
    values: dict[str, float | None] = {"Steps": gained("step"), "Time": seconds}
    looks = [row for row in run.of_kind("val") if row["stage"] == stage]
    if looks:
        values |= {"Answers right": looks[-1].get("accuracy"), "Validation loss": looks[-1].get("loss")}
    skipped = sum(row["stage"] == stage and row.get("fault") != "rollback" for row in run.of_kind("anomaly"))
    values["Skipped"] = skipped or None
    for head, name in (("Samples/s", "samples"), ("Tokens/s", "tokens")):
        total = gained(name)
        values[head] = total / seconds if total is not None and seconds else None
    # A row's seconds are those since the row before: the time that its values are means over.
    at = [0.0 if before.get("seconds") is None else before["seconds"], *(row.get("seconds") or 0.0 for row in rows)]
    weights = [max(end - start, 0.0) for start, end in pairwise(at)]
    for head, name in {"Patches/s": "patches_per_s", **_MEANS}.items():
        pairs = [(row[name], w) for row, w in zip(rows, weights, strict=True) if row.get(name) is not None]
        total_weight = sum(weight for _, weight in pairs)
        values[head] = sum(value * weight for value, weight in pairs) / total_weight if total_weight else None
    values["Memory"] = max((row["memory_bytes"] for row in rows if row.get("memory_bytes")), default=None)
    return {head: value for head, value in values.items() if value is not None}
