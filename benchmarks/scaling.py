"""How the cost of a training step grows with K, prefix, batch and vocabulary, beside the analytic floor.

    python benchmarks/scaling.py --prefix 512 --batch 2 --vocab 32768 \\
        --json scaling.json --figure docs/images/latent_scaling.png

Each point is forward and backward of ours and of one ordinary pass over the same tokens, in turns, both labels only and
without checkpointing; the fastest run counts (`measure.time_interleaved`). The floor is the measured single pass times
the ratio of the arithmetic: one pass over the same tokens and K - 1 passes of one token, over the one pass
(`latent_step.floor_ratio`).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

import torch

from benchmarks.latent_step import floor_ratio, run_step
from benchmarks.measure import time_interleaved
from benchmarks.shapes import Shape, add_shape_arguments, describe, shape_from
from benchmarks.sides import build_step

#: Axis -> factors of the base shape's value; K is swept from none.
FACTORS = {"prefix": (0.25, 0.5, 1, 2), "batch": (0.25, 0.5, 1, 2), "vocab": (0.125, 0.25, 0.5, 1)}
LABELS = {"latents": "latents K", "prefix": "prefix in tokens", "batch": "rows", "vocab": "vocabulary"}


def sweep(shape: Shape) -> dict[str, list[Shape]]:
    """Shapes that differ from `shape` in one field, by that field's name."""
    axes = {"latents": [replace(shape, latents=k) for k in sorted({0, 1, 3, 6, 12, shape.latents})]}
    for name, factors in FACTORS.items():
        values = sorted({max(1, int(getattr(shape, name) * factor)) for factor in factors})
        axes[name] = [replace(shape, **{name: value}) for value in values]
    return axes


def measure_point(shape: Shape, device: str, repeats: int) -> dict[str, float]:
    runs = {}
    for side in ("ours", "single_pass"):
        step, model = build_step(side, shape, device, checkpointing=False)
        runs[side] = lambda step=step, model=model: run_step(step, model)
    times = time_interleaved(runs, dict.fromkeys(runs, repeats))
    ours, single = times["ours"]["min_s"], times["single_pass"]["min_s"]
    floor = single * floor_ratio(shape)
    return {"ours_s": ours, "single_pass_s": single, "floor_s": floor, "ours_vs_floor": ours / floor}


def draw(table: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, panels = plt.subplots(1, len(table), figsize=(3.2 * len(table), 3), sharey=True, layout="constrained")
    styles = {"ours_s": ("ours", "o-"), "single_pass_s": ("one ordinary pass", "s--"), "floor_s": ("floor", "k:")}
    for panel, (axis, points) in zip(panels, table.items(), strict=True):
        for key, (label, style) in styles.items():
            panel.plot([p["value"] for p in points], [p[key] for p in points], style, label=label, markersize=4)
        panel.set_xlabel(LABELS[axis])
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)  # after the last panel, whose values count as well
    panels[0].set_ylabel("seconds a step")
    panels[0].legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--repeats", type=int, default=3, help="timed runs a point and side (default 3)")
    add("--json", type=Path, help="write everything there")
    add("--figure", type=Path, help="draw the figure there (PNG)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = shape_from(options)
    print(f"{shape}, {options.device}, {options.threads} threads", flush=True)
    table: dict[str, list[dict[str, Any]]] = {}
    for axis, shapes in sweep(shape).items():
        table[axis] = []
        for point in shapes:
            row = {"value": getattr(point, axis), **measure_point(point, options.device, options.repeats)}
            table[axis].append(row)
            print(
                "{axis:8}{value:8}  ours {ours_s:7.3f} s  single pass {single_pass_s:7.3f}  floor {floor_s:7.3f}  "
                "ours / floor {ours_vs_floor:.2f}".format(axis=axis, **row),
                flush=True,
            )
    worst = max(row["ours_vs_floor"] for rows in table.values() for row in rows)
    result = {"shape": describe(shape), "device": options.device, "threads": options.threads, "table": table,
              "largest_vs_floor": worst}  # fmt: skip
    print(json.dumps({"largest_vs_floor": worst}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.figure:
        draw(table, options.figure)


if __name__ == "__main__":
    main()
