"""Time, interleaved in one process; memory, each side in a fresh process of its own.

On a CPU memory is what the process gains over its size after the model was built (VmHWM and VmRSS of
/proc/self/status), with an allocator that gives freed blocks back at once; on a GPU it is what torch allocated.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import Shape
from benchmarks.sides import build_step

ROOT = Path(__file__).resolve().parents[1]
#: glibc: every block above 64 KiB from the system and back to it, so that the process is as large as what lives.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_interleaved(runs: dict[str, Callable[[], Any]], repeats: dict[str, int]) -> dict[str, dict[str, float]]:
    """Seconds of each run: one to warm up, then in turns, so that a busy machine is busy for all of them.

    Processor time, where a CPU computes in one thread; otherwise wall time.

    Args:
        repeats: timed runs of each; a run of one repeat is not warmed up.
    """
    on_one_thread = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if on_one_thread else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        if repeats[name] > 1:
            run()
    for turn in range(max(repeats.values())):
        for name, run in runs.items():
            if turn < repeats[name]:
                gc.collect()
                synchronize()
                begin = clock()
                run()
                synchronize()
                seconds[name].append(clock() - begin)
    return {
        name: {"min_s": min(values), "median_s": statistics.median(values), "runs": len(values)}
        for name, values in seconds.items()
    }


def measure_memory(side: str, shape: Shape, device: str, checkpointing: bool = False) -> dict[str, float]:
    """MiB of one forward and backward: ``held`` after the forward, ``peak`` over both."""
    job = {"side": side, "shape": asdict(shape), "device": device, "checkpointing": checkpointing}
    environment = {**os.environ, **EXACT_MALLOC, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _memory_job(side: str, shape: dict[str, Any], device: str, checkpointing: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    step, model = build_step(side, Shape(**shape), device, checkpointing)
    # What is made once in a process (kernels, thread pools, Python's caches) is made by a step on a small batch.
    small, small_model = build_step(
        side, Shape(**{**shape, "prefix": 8 + 256 * shape["tiles"], "batch": 1}), device, checkpointing
    )
    small().backward()
    del small, small_model
    baseline = _now(device, reset=True)
    loss = step()
    held = _now(device)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.base_model.parameters() if parameter.requires_grad)
    return {"held_mib": held - baseline, "peak_mib": _peak(device) - baseline}


def _now(device: str, reset: bool = False) -> float:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status("VmHWM")


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(_memory_job(**json.loads(sys.argv[1]))))
