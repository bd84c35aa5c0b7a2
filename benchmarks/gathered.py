"""Bytes that ZeRO-3 gathers in a step on two ranks: with no thoughts, and with a number of them that changes each step.

    python benchmarks/gathered.py                # the default configuration: the latent loop held as one module
    python benchmarks/gathered.py --by-layers    # as where the decoder does not fit the live budget

Read from DeepSpeed's comms logger, with `ds_configs/zero3.json`, on matrices larger than its persistence threshold
(smaller weights are never partitioned), after ten steps, in which DeepSpeed records the order of calls. The two ranks'
rows hold different numbers of thoughts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

#: Every matrix has 262,144 elements or more; the lengths of the rows are of no interest here.
SIZES: dict[str, Any] = dict(layers=2, hidden=512, kv_heads=4, mlp=1024, vocab=1000, prefix=12, labels=5, batch=2)
WARM_UP, STEPS, MOST_LATENTS = 10, 20, 6


def measure_gathered(by_layers: bool = False) -> dict[str, float]:
    """Bytes a step at K = 0 (``k0``) and at a changing K (``changing``), their ratio, and the bytes of the weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", __file__, "--ranks", *(["--by-layers"] if by_layers else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"two ranks failed:\n{(done.stdout + done.stderr)[-4000:]}")
    result: dict[str, float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"k0"')))
    return result


def _gathered_bytes() -> int:
    """All bytes of all-gathers so far: sizes and counts, by operation, as the logger keeps them."""
    from deepspeed.comm import comm

    total = 0
    for operation, sizes in comm.comms_logger.comms_dict.items():
        if "all_gather" in operation or "allgather" in operation:
            total += sum(size * values[0] for size, values in sizes.items())
    return total


def _run_rank(by_layers: bool) -> None:
    import torch

    from benchmarks.shapes import Shape, build_batch, build_model
    from coconut.training.engine import start_engine
    from coconut.utils.distributed import get_rank, init_distributed_training, shutdown_distributed

    init_distributed_training(force=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    zero = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())["zero_optimization"]
    if by_layers:
        zero["stage3_max_live_parameters"] = 5000
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True},
    }
    figures = {}
    for name, most in (("k0", 0), ("changing", MOST_LATENTS)):
        engine = start_engine(build_model(Shape(**SIZES), device), settings)
        draw = random.Random(0)
        start = 0
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                start = _gathered_bytes()
            k = max(0, draw.randint(0, most) - get_rank())
            batch = build_batch(Shape(**SIZES, latents=k), device, seed=step)
            engine.backward(engine(**batch, loss_only=True, num_items_in_batch=10).loss)
            engine.step()
        figures[name] = (_gathered_bytes() - start) / STEPS
        figures["weights"] = 4 * sum(parameter.ds_numel for parameter in engine.module.parameters())
        engine.destroy()
    if get_rank() == 0:
        print(json.dumps({**figures, "gathered_vs_k0": figures["changing"] / figures["k0"]}))
    shutdown_distributed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by-layers", action="store_true", help="let ZeRO-3 gather and release layer by layer")
    parser.add_argument("--ranks", action="store_true", help=argparse.SUPPRESS)  # what torchrun starts
    options = parser.parse_args()
    if options.ranks:
        _run_rank(options.by_layers)
    else:
        print(json.dumps(measure_gathered(options.by_layers)))


if __name__ == "__main__":
    main()
