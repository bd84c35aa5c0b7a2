"""Sentences and tables of the report: plain values, ready for the page.

Where a method was trained more than once, a number is the mean of its runs, and the spread stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coconut.evaluation.collect import Evaluation, Method, spread
from coconut.evaluation.wording import count, duration, percent


def lead_sentences(methods: Sequence[Method]) -> list[str]:
    """What was found, in a sentence or two that hold for whatever was evaluated."""
    main = main_method(methods)
    if main is None:
        return []
    accuracy, passes = mean_of(main.plain, "accuracy"), mean_of(main.plain, "mean_forward_passes")
    questions = main.plain[0].summary["n_samples"]
    runs = f" (mean of {len(main.plain)} runs)" if len(main.plain) > 1 else ""
    first = f"{main.name} answers {percent(accuracy)} of {questions:,} questions{runs}, "
    first += f"in {passes:.3g} sequential forward passes each"
    longer = next((m for m in methods if m is not main and mean_of(m.plain, "mean_forward_passes") > passes), None)
    if longer is not None:
        other = mean_of(longer.plain, "mean_forward_passes")
        first += f"; {longer.name} {percent(mean_of(longer.plain, 'accuracy'))}, in {other:.3g}"
    changed = [f"{label} {percent(mean_of(v, 'accuracy'))}" for label, v in main.variants.items() if label]
    return [f"{first}.", *([f"{main.name} under changed conditions: {', '.join(changed)}."] if changed else [])]


def headline_tiles(methods: Sequence[Method]) -> list[dict[str, str]]:
    """The few numbers that are set large."""
    main = main_method(methods)
    if main is None:
        return []
    tiles = [{"value": percent(mean_of(m.plain, "accuracy")), "label": f"{m.name}: answers right"} for m in methods[:3]]
    passes = mean_of(main.plain, "mean_forward_passes")
    longest = max((mean_of(m.plain, "mean_forward_passes") for m in methods), default=passes)
    if longest > passes:
        tiles.append(
            {"value": f"{passes / longest:.2f}×", "label": "sequential forward passes beside written reasoning"}
        )
    return tiles


def methods_table(methods: Sequence[Method]) -> dict[str, Any]:
    """Head and rows of the table of methods; of several runs, the mean and its spread."""
    head = ["Method", "Accuracy", "Generated tokens", "Sequential passes", "Time a sample", "Training samples",
            "Optimizer steps", "Training FLOPs"]  # fmt: skip
    rows = []
    for method in methods:
        evaluations = method.plain
        cost = {name: [e.cost[name] for e in evaluations if name in e.cost] for name in ("samples", "steps", "flops")}
        cells = [_accuracy_cell(evaluations)]
        cells += [
            {"value": f"{mean_of(evaluations, name):.1f}"} for name in ("mean_generated_tokens", "mean_forward_passes")
        ]
        cells += [{"value": f"{1000 * mean_of(evaluations, 'seconds_per_sample'):.1f} ms"}]
        cells += [{"value": count(sum(values) / len(values) if values else None)} for values in cost.values()]
        rows.append({"name": method.name, "cells": cells})
    data, n_samples = methods[0].plain[0].data.name, methods[0].plain[0].summary["n_samples"]
    intro = f"Greedy answers to {n_samples:,} questions of “{data}”, each asked once."
    return {"intro": intro, "head": head, "rows": rows}


def seeds_table(methods: Sequence[Method]) -> dict[str, Any] | None:
    """Accuracy of every run on its own, where a method was trained more than once."""
    columns = [(m.name, label, evaluations) for m in methods for label, evaluations in m.variants.items()]
    if not any(len(evaluations) > 1 for _, _, evaluations in columns):
        return None
    seeds = dict.fromkeys(e.seed for _, _, evaluations in columns for e in evaluations)
    rows: list[dict[str, Any]] = []
    for seed in sorted(seeds):
        found = [[e.summary["accuracy"] for e in evaluations if e.seed == seed] for _, _, evaluations in columns]
        rows.append({"name": seed, "cells": [" / ".join(map(percent, values)) or "–" for values in found]})
    spreads = [spread([e.summary["accuracy"] for e in evaluations]) for _, _, evaluations in columns]
    rows.append({"name": "mean ± deviation", "cells": [f"{percent(s[0])} ± {100 * s[1]:.1f}" for s in spreads]})
    head = ["Run", *(f"{name}, {label}" if label else name for name, label, _ in columns)]
    return {"head": head, "rows": rows}


def times_list(times: dict[str, float] | None) -> dict[str, Any] | None:
    """Parts with their time, and the width of each one's bar in percent."""
    if not times:
        return None
    longest, total = max(times.values()) or 1.0, sum(times.values())
    parts = [{"name": name, "value": duration(s), "width": f"{100 * s / longest:.1f}"} for name, s in times.items()]
    return {"intro": f"{duration(total)} in all, the report not counted.", "parts": parts}


def machine_lines(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the evaluations ran on, each kind once."""
    lines = []
    for e in evaluations:
        machine, options = e.summary.get("machine"), e.summary["options"]
        if machine:
            lines.append(
                f"Evaluated on {machine['ranks']} × {machine['device']}, {machine['threads_per_rank']} threads a rank, "
                f"weights in {machine['dtype']}, {options['batch_size']} questions a batch, at most "
                f"{options['max_new_tokens']} new tokens."
            )
    return list(dict.fromkeys(lines))


def main_method(methods: Sequence[Method]) -> Method | None:
    """The method the page is about: the one with most thoughts, else the first."""
    return max(methods, key=lambda method: mean_of(method.plain, "mean_latents"), default=None)


def mean_of(evaluations: Sequence[Evaluation], name: str) -> float:
    """Mean over runs of an entry of the summary."""
    return spread([float(e.summary[name]) for e in evaluations])[0]


def interval_of(evaluations: Sequence[Evaluation]) -> tuple[float, float]:
    """Of one evaluation the 95 % interval; of several runs the least and the greatest."""
    if len(evaluations) == 1:
        low, high = evaluations[0].summary["accuracy_interval_95"]
        return low, high
    _, _, low, high = spread([e.summary["accuracy"] for e in evaluations])
    return low, high


def _accuracy_cell(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    low, high = interval_of(evaluations)
    note = f"{100 * low:.1f} – {100 * high:.1f}"
    mean, deviation, *_ = spread([e.summary["accuracy"] for e in evaluations])
    if len(evaluations) > 1:
        return {"value": f"{percent(mean)} ± {100 * deviation:.1f}", "note": f"{note}, {len(evaluations)} runs"}
    return {"value": percent(mean), "note": note}
