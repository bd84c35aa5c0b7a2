"""Steps that would do harm: a loss or gradient that is not finite, or a loss far above what it was.

losses of all ranks, added up --judge--> fine: the step is taken
                                     --> bad: every rank drops its gradients (the step is skipped)
max_skipped_steps in a row  --> weights and optimizer of the last checkpoint; the data go on behind the bad ones
max_rollbacks of these      --> TrainingError: what was seen
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

WINDOW = 64  # losses that a spike is measured against
FEWEST = 16  # no judgement before so many
LEAST_RISE = 1.0  # nats a label token above the mean: late losses near 0 scatter by many of their deviations


def judge_loss(loss: float, recent: Sequence[float], sigmas: float | None) -> str | None:
    """What is wrong with a step's loss (mean of a label token over all ranks); None when nothing is.

    Args:
        recent: losses of the steps before, of the same stage.
        sigmas: standard deviations above their mean that make a spike; None looks only at finiteness.
    """
    if not math.isfinite(loss):
        return "non-finite loss"
    if sigmas is None or len(recent) < FEWEST:
        return None
    mean = sum(recent) / len(recent)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in recent) / len(recent))
    if loss > mean + max(sigmas * deviation, LEAST_RISE):
        return f"loss spike ({loss:.4g}, after {mean:.4g} ± {deviation:.2g})"
    return None


def remember(loss: float, recent: list[float]) -> None:
    """Add a sound loss to the window."""
    recent.append(loss)
    del recent[:-WINDOW]


# -- skipping a step --


@contextmanager
def guarded_update(engine: Any, drop: bool) -> Iterator[None]:
    """Inside, `engine.step()` at an accumulation boundary applies no gradient that is not finite, and none with `drop`.

    The step is dropped the way DeepSpeed drops one whose fp16 gradients overflow: gradients are cleared, moments and
    step counts stay, and ``engine.was_step_applied()`` is False, on every rank.
    """
    optimizer = engine.optimizer
    replaced: dict[str, Any] = {}
    of_engine: dict[str, Any] = {}
    if hasattr(optimizer, "_loss_scale_update_and_overflow_cleanup"):  # ZeRO-3; looks at the gradient norm itself
        if drop:
            replaced["_overflow_check_and_loss_scale_update"] = partial(_overflow_zero3, optimizer)
    elif hasattr(optimizer, "check_grad_overflow"):  # ZeRO-1 and 2
        optimizer.check_grad_overflow = True  # off by default for bf16
        if drop:
            replaced["check_overflow"] = partial(_overflow_zero12, optimizer)
    else:
        replaced["step"] = partial(_step_if_finite, engine, optimizer.step, drop)
        of_engine["clip_fp32_gradients"] = partial(_clip, engine)
    changes = [(optimizer, name, function) for name, function in replaced.items()]
    changes += [(engine, name, function) for name, function in of_engine.items()]
    for owner, name, function in changes:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, _ in changes:
            delattr(owner, name)  # the class's own is seen again


def _overflow_zero3(optimizer: Any, update_scale: bool = True) -> bool:
    optimizer.overflow = True
    return bool(optimizer._loss_scale_update_and_overflow_cleanup()) if update_scale else True


def _overflow_zero12(optimizer: Any, partition_gradients: bool = True) -> None:
    optimizer.overflow = True


def _clip(engine: Any) -> None:
    """What the engine does without ZeRO in float32; DeepSpeed 0.19.8 throws the norm away that it finds by it."""
    from deepspeed.runtime.utils import clip_grad_norm_

    engine._global_grad_norm = clip_grad_norm_(
        parameters=engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu
    )


def _step_if_finite(engine: Any, step: Callable[[], Any], drop: bool) -> None:
    # Whole on every rank and reduced already, so all ranks see the same.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if engine.gradient_clipping() == 0 and not hasattr(engine.optimizer, "_global_grad_norm"):
        engine._global_grad_norm = torch.nn.utils.get_total_norm(gradients)
    engine.optimizer.overflow = drop or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    if not engine.optimizer.overflow:
        step()
