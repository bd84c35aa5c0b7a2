"""How long a checkpoint holds up training: written between two steps, and written while training goes on.

    python benchmarks/checkpoint.py [--parameters 50] [--folder DIR] [--json FILE]

One rank, a real DeepSpeed ZeRO-3 engine on CPU, a decoder-sized stack of matrices; 12 bytes a parameter. In turns, so
that a busy machine is busy for all three: STEPS steps alone, the same with `save` before them, the same with `begin`
before them and `finish` after them. The floor of `begin` is the copy of the state in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

import torch

from coconut.training.checkpoint import CheckpointFolder
from coconut.training.pieces import copy_pieces, local_bytes
from coconut.training.state import TrainState
from coconut.utils.distributed import init_distributed_training, shutdown_distributed

WIDTH, BATCH, ROUNDS = 1024, 256, 5


def build_engine(millions: float) -> Any:
    import deepspeed

    layers = max(1, round(millions * 1e6 / WIDTH**2))
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    settings = {
        "train_batch_size": BATCH,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    return deepspeed.initialize(model=model, config=settings)[0]


def measure(millions: float, folder: Path) -> dict[str, float]:
    """Seconds, medians over rounds: ``copy``, ``save`` and ``begin`` alone, ``steps`` alone and with the two."""
    engine = build_engine(millions)
    checkpoints = CheckpointFolder(folder, keep=1, run={})
    inputs = torch.randn(BATCH, WIDTH)

    def step() -> None:
        engine.backward(engine(inputs).square().mean())
        engine.step()

    def timed(action: Any) -> float:
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    step()
    one_step = min(timed(step) for _ in range(3))
    one_save = timed(lambda: checkpoints.save(engine, TrainState()))
    n_steps = max(3, round(3 * one_save / one_step))  # the writing fits in between, as it would in a run
    seconds: dict[str, list[float]] = {
        name: [] for name in ("copy", "save", "begin", "steps", "with_save", "with_begin")
    }

    def steps() -> None:
        for _ in range(n_steps):
            step()

    for turn in range(1, ROUNDS + 1):
        state = TrainState(step=turn)
        seconds["copy"].append(timed(lambda: copy_pieces(engine)))
        seconds["steps"].append(timed(steps))
        save = timed(lambda state=state: checkpoints.save(engine, state))
        seconds["save"].append(save)
        seconds["with_save"].append(save + timed(steps))
        begin = timed(lambda state=state: checkpoints.begin(engine, state))
        seconds["begin"].append(begin)
        seconds["with_begin"].append(begin + timed(steps) + timed(checkpoints.finish))
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return found | {"n_steps": float(n_steps), "mib": local_bytes(engine) / 2**20}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=50, help="millions of them (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    init_distributed_training(force=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        found = measure(arguments.parameters, Path(scratch))
    shutdown_distributed()
    alone, save, begin = found["steps"], found["with_save"] - found["steps"], found["with_begin"] - found["steps"]
    print(
        f"a checkpoint of {found['mib']:.0f} MiB, then {found['n_steps']:.0f} steps of {alone:.1f} s together; seconds:"
    )
    print(f"  written between two steps    training waits {found['save']:.2f}   the steps take longer by {save:.2f}")
    print(f"  written under the steps      training waits {found['begin']:.2f}   the steps take longer by {begin:.2f}")
    print(f"  floor, a copy in memory                     {found['copy']:.2f}")
    print(f"ratio of the waits, background / between: {found['begin'] / found['save']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
