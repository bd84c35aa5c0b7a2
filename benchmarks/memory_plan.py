"""The memory plan against measurement: what `coconut.training.run_plan` computes, divided by what a CPU run takes.

    python benchmarks/memory_plan.py                       # every case
    python benchmarks/memory_plan.py vocabulary --json FILE

Each case trains a model of random weights on its ranks with the project's engine. Measured is the largest growth of a
rank's process (VmHWM of /proc/self/status, with an allocator that gives freed blocks back at once) from before the
model is built to after the second optimizer step; what is made once in a process was made before by a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from benchmarks.measure import EXACT_MALLOC, _now, _peak
from benchmarks.shapes import PRESETS, Shape, build_batch, build_model, text_config

STEPS = 2


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    shape: Shape
    zero: str | None = None  # of ds_configs/; None: no ZeRO
    ranks: int = 1
    checkpointing: bool = False
    max_live: int | None = None  # stage3_max_live_parameters, in place of the file's


_SLIM = PRESETS["slim"]
_WIDE = replace(_SLIM, hidden=512, mlp=2048, vocab=4096, prefix=256, batch=2)
CASES = {
    "vocabulary": Case(replace(_SLIM, prefix=128, batch=2, latents=4)),
    "activations": Case(replace(_SLIM, prefix=512, vocab=4096)),
    "checkpointing": Case(replace(_SLIM, prefix=512, vocab=4096, batch=8), checkpointing=True),
    "zero1": Case(_WIDE, zero="zero1", ranks=2),
    "zero2": Case(_WIDE, zero="zero2", ranks=2),
    "zero3": Case(_WIDE, zero="zero3", ranks=2),
    "zero3-layers": Case(replace(_WIDE, batch=1, layers=8), zero="zero3", ranks=2, max_live=5_000_000),
    "zero3-cot": Case(replace(_WIDE, batch=1, layers=8, latents=0), zero="zero3", ranks=2, max_live=5_000_000),
    "bf16": Case(replace(_WIDE, dtype="bfloat16"), zero="zero2", ranks=2),
}
_SMALL = dict(layers=1, hidden=64, mlp=64, vocab=512, prefix=16, batch=1, latents=1, labels=4)


def ds_config(case: Case) -> dict[str, Any]:
    from coconut.config import Config
    from coconut.config.deepspeed import resolve_ds_config

    path = None if case.zero is None else str(ROOT / "ds_configs" / f"{case.zero}.json")
    config = Config(
        {"deepspeed": path, "batch_size_training": case.shape.batch, "bf16": case.shape.dtype == "bfloat16"}
    )
    resolved = resolve_ds_config(config, world_size=case.ranks, hidden_size=case.shape.hidden)
    if case.max_live is not None:
        resolved["zero_optimization"]["stage3_max_live_parameters"] = case.max_live
    return resolved


def planned(case: Case) -> Any:
    import torch

    from coconut.training.run_plan import PlannedModel, ZeroSettings
    from coconut.training.simulation import BatchShape, outline_model

    shape = case.shape
    planned = PlannedModel(
        outline_model(text_config(shape)),
        BatchShape(shape.batch, shape.length, shape.batch * shape.labels, shape.latents),
        dtype=getattr(torch, shape.dtype),
        checkpointing=case.checkpointing,
        on_cpu=True,
    )
    return planned.memory(case.ranks, ZeroSettings.from_ds_config(ds_config(case)))


def measure(name: str) -> float:
    """Bytes by which the largest rank grew."""
    case = CASES[name]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={case.ranks}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", __file__, "--rank-of", name]
    environment = {**os.environ, **EXACT_MALLOC, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: its ranks failed:\n{(done.stdout + done.stderr)[-4000:]}")
    grown = [json.loads(line)["grown_mib"] for line in done.stdout.splitlines() if line.startswith('{"grown_mib"')]
    return max(grown) * 2**20


def _run_rank(name: str) -> None:
    import torch

    from coconut.utils.distributed import init_distributed_training, shutdown_distributed

    torch.set_num_threads(1)
    init_distributed_training(force=True)
    case = CASES[name]
    _train(replace(case, shape=replace(case.shape, **_SMALL)))
    before = _now("cpu", reset=True)
    _train(case)
    print(json.dumps({"grown_mib": _peak("cpu") - before}), flush=True)
    shutdown_distributed()


def _train(case: Case) -> None:
    from coconut.training.engine import start_engine

    model = build_model(case.shape, "cpu")
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    engine = start_engine(model, ds_config(case))
    for step in range(STEPS):
        loss = engine(**build_batch(case.shape, "cpu", seed=step), loss_only=True, num_items_in_batch=10).loss
        engine.backward(loss)
        engine.step()
    engine.destroy()


def compare(name: str) -> dict[str, Any]:
    plan = planned(CASES[name])
    measured = measure(name)
    parts = {part: round(n_bytes / 2**20, 1) for part, n_bytes in plan.parts.items()}
    return {
        "case": name, **asdict(CASES[name]), "moment": plan.moment, "parts_mib": parts,
        "planned_mib": plan.total / 2**20, "measured_mib": measured / 2**20,
        "planned_vs_measured": plan.total / measured,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # what torchrun starts
    options = parser.parse_args()
    if options.rank_of:
        _run_rank(options.rank_of)
        return
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    rows = []
    for name in options.cases or CASES:
        rows.append(row := compare(name))
        print(
            "{case:14} planned {planned_mib:7.0f} MiB (worst: {moment})  measured {measured_mib:7.0f}  ratio "
            "{planned_vs_measured:.2f}  {parts_mib}".format(**row),
            flush=True,
        )
    worst = max(rows, key=lambda row: abs(row["planned_vs_measured"] - 1))
    print(json.dumps({"worst": worst["case"], "planned_vs_measured": worst["planned_vs_measured"]}))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
