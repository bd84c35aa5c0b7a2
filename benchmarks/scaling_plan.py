"""The tables of docs/scaling.md: what InternVL3 needs on 8, 64 and 512 GPUs. Computed, not measured; no GPU is used.

    python benchmarks/scaling_plan.py [--models internvl3-1b ...]

For each model and number of GPUs every ZeRO setting is planned (`coconut.training.run_plan`), and the first that fits
is named, in the order of what they cost in time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

import torch

from coconut.model.presets import PRESETS, preset_config
from coconut.training.run_plan import (
    MemoryPlan,
    PlannedModel,
    ZeroSettings,
    count_parameters,
)
from coconut.training.simulation import BatchShape, outline_model

GPUS = (8, 64, 512)
#: One sample of 13 tiles of 256 tokens, 200 tokens of text, 100 of them labels, and 8 thoughts between two markers.
TILES, TEXT, LABELS, LATENTS = 13, 200, 100, 8
SAMPLE = BatchShape(1, 256 * TILES + TEXT + LATENTS + 2, LABELS, LATENTS, TILES)
#: Left to the framework, NCCL and fragmentation.
USABLE = 0.9


def settings() -> dict[str, ZeroSettings]:
    """The files of ds_configs/, the fastest first; and ZeRO-3 with the text model held whole where it may not be."""
    files = {
        name: ZeroSettings.from_ds_config(json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()))
        for name in ("zero1", "zero2", "zero3", "zero3_offload")
    }
    whole = replace(files["zero3"], max_live=10**12)
    return {
        "zero1": files["zero1"],
        "zero2": files["zero2"],
        "zero3, whole": whole,
        "zero3": files["zero3"],
        "zero3_offload": files["zero3_offload"],
    }


def describe(plan: MemoryPlan, usable: float) -> str:
    mark = "" if plan.total <= usable else " ✗"
    return f"{plan.total / 1e9:.0f}{f' + {plan.host / 1e9:.0f} host' if plan.host else ''}{mark}"


def rows(name: str, memory_gb: float) -> Iterator[str]:
    """Lines of the table for one model."""
    model = outline_model(preset_config(name))
    planned = PlannedModel(model, SAMPLE, dtype=torch.bfloat16, checkpointing=True)
    usable = USABLE * memory_gb * 1e9
    for gpus in GPUS:
        plans = {label: planned.memory(gpus, zero) for label, zero in settings().items()}
        fitting = [label for label, plan in plans.items() if plan.total <= usable]
        best = plans[fitting[0]] if fitting else min(plans.values(), key=lambda plan: plan.total)
        parts = sorted(best.parts.items(), key=lambda item: -item[1])[:2]
        binds = ", ".join(f"{part} {size / 1e9:.0f}" for part, size in parts)
        cells = [describe(plan, usable) for plan in plans.values()]
        yield (
            f"| {name} ({count_parameters(model) / 1e9:.2f} B) | {gpus} | {' | '.join(cells)} | "
            f"{fitting[0] if fitting else 'none fits'} | {binds} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--memory", type=float, default=80.0, help="GB of a GPU, 10^9 bytes (default: %(default)s)")
    options = parser.parse_args()
    print(f"| model | GPUs | {' | '.join(settings())} | take | largest parts there, GB |")
    print("|---" * (len(settings()) + 4) + "|")
    for name in options.models:
        for line in rows(name, options.memory):
            print(line, flush=True)


if __name__ == "__main__":
    main()
