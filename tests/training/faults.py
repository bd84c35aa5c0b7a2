"""Faults for the ranks of a test: what no option of the product can ask for.

A fault is ``kind@rank:step,step...``, several separated by blanks; a rank of ``*`` is every rank. Steps count the
optimizer steps that were begun, from 0. Kinds: nan (the loss), gradient (not finite, the loss is), spike, stuck, die,
memory; save, which dies at the n-th fsync or rename, that is inside the writing of a checkpoint, export or marker;
load, which dies where the weights are about to be read; and slow, in which each fsync of a thread takes so many tenths
of a second, so that steps go on under it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch


def build_in(faults: str, rank: int) -> None:
    """Make this process fail as `faults` says."""
    plan = {}
    for fault in faults.split():
        kind, _, where = fault.partition("@")
        of_rank, _, steps = where.partition(":")
        if kind == "save" and of_rank in ("*", str(rank)):
            _die_at_write(int(steps))
        elif kind == "load" and of_rank in ("*", str(rank)):
            _die_before_weights()
        elif kind == "slow" and of_rank in ("*", str(rank)):
            _write_slowly(int(steps) / 10)
        elif of_rank in ("*", str(rank)):
            plan |= {int(step): kind for step in steps.split(",")}
    if not plan:
        return
    from coconut.model import MultimodalCoconut
    from coconut.training import trainer

    now = {"step": -1}
    seed_step = trainer.seed_step

    def noting(seed: int, step: int) -> None:
        now["step"] = step
        seed_step(seed, step)

    trainer.seed_step = noting
    MultimodalCoconut.forward = partial_method(MultimodalCoconut.forward, plan, now)


def partial_method(forward: Any, plan: dict[int, str], now: dict[str, int]) -> Any:
    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        kind = plan.get(now["step"]) if self.training else None
        if kind is not None:
            print(f"\nFAULT {kind} {time.monotonic()}", flush=True)
            output.loss = KINDS[kind](output.loss)
        return output

    return failing


def _die_at_write(number: int) -> None:
    """Kill this process just before, or just after, a rename or an fsync: odd numbers before, even ones after."""
    left = {"calls": number}

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left["calls"] -= 1
            if left["calls"] == 0 and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if left["calls"] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync = dying(os.fsync)
    Path.rename = dying(Path.rename)
    Path.replace = dying(Path.replace)


def _die_before_weights() -> None:
    from coconut.model import loading

    enter = loading._enter_zero3

    def dying(*args: Any) -> None:
        enter(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    loading._enter_zero3 = dying


def _write_slowly(seconds: float) -> None:
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slow


def _stuck(loss: torch.Tensor) -> torch.Tensor:
    while True:
        time.sleep(1)


def _die(loss: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return loss


def _memory(loss: torch.Tensor) -> torch.Tensor:
    return loss + torch.empty(1 << 50)[0]


def _gradient(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(partial(torch.mul, torch.tensor(float("nan"))))
    return loss


KINDS = {
    "nan": lambda loss: loss * float("nan"),
    "gradient": _gradient,
    "spike": lambda loss: loss * 1000,
    "stuck": _stuck,
    "die": _die,
    "memory": _memory,
}
