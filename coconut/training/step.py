"""One optimizer step on all ranks: what it consists of, and whether its update may be applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coconut.model import MultimodalCoconut
from coconut.training.anomalies import guarded_update
from coconut.training.memory import explaining_memory
from coconut.training.stop import StopRequests
from coconut.training.validation import to_device
from coconut.training.watchdog import Watchdog
from coconut.types import Batch
from coconut.utils.distributed import all_reduce_sum, get_world_size


@dataclass(frozen=True)
class StepPlan:
    """What all ranks together are about to do; the same on every rank."""

    batches: int
    label_tokens: int
    samples: int
    tokens: int
    patches: int
    stop_reason: str | None  # why nobody takes this step


def agree(micro_batches: Sequence[Batch], stops: StopRequests) -> StepPlan:
    """Add up what the ranks bring, and whether one of them was asked to stop."""
    patches = sum(int(batch.tensors["num_patches"].sum()) for batch in micro_batches if "num_patches" in batch.tensors)
    counts = [
        len(micro_batches),
        sum(batch.n_label_tokens for batch in micro_batches),
        sum(len(batch.keys) for batch in micro_batches),
        sum(batch.n_tokens for batch in micro_batches),
        patches,
    ]
    sums = all_reduce_sum([*map(float, counts), *stops.flags()])
    batches, labels, samples, tokens, n_patches = map(int, sums[: len(counts)])
    return StepPlan(batches, labels, samples, tokens, n_patches, stops.reason(sums[len(counts) :]))


@dataclass(frozen=True)
class StepResult:
    """How a step went."""

    loss_sum: float  # of this rank's label tokens
    loss: float  # mean of a label token over all ranks
    fault: str | None  # why the update was dropped, on every rank


def take_step(
    engine: Any,
    model: MultimodalCoconut,
    micro_batches: Sequence[Batch],
    plan: StepPlan,
    *,
    judge: Any,
    watchdog: Watchdog,
    config: Any,
) -> StepResult:
    """Forward, backward and update; the update is dropped on all ranks when `judge` or the gradients object.

    Args:
        judge: mean loss -> what is wrong with it, or None; decides alike on every rank.
        config: says which settings would help where memory runs out.

    Raises:
        TrainingError: memory ran out.
    """
    labels, world = max(plan.label_tokens, 1), get_world_size()
    loss_sum, loss, fault = 0.0, 0.0, None
    for number, batch in enumerate(micro_batches, 1):
        watchdog.enter("forward and backward", batch.keys)
        with explaining_memory(watchdog, batch, config):
            # The engine averages over ranks: the sum over all label tokens of the step, divided by their number.
            output = engine(**to_device(batch, model.device), loss_only=True, num_items_in_batch=labels / world)
            engine.backward(output.loss, scale_wrt_gas=False)
            loss_sum += float(output.loss.detach()) * labels / world
            watchdog.enter("optimizer step", batch.keys)
            if number == len(micro_batches):
                loss = all_reduce_sum([loss_sum])[0] / labels
                fault = judge(loss)
            with guarded_update(engine, drop=fault is not None):
                engine.step()
    # With fp16 an overflow is how the loss scale is found; DeepSpeed counts those.
    if fault is None and not engine.was_step_applied() and not config.fp16:
        fault = "non-finite gradient"
    return StepResult(loss_sum, loss, fault)


def seed_step(seed: int, step: int) -> None:
    """Draws such as dropout depend on the step alone, so that a resumed run repeats them."""
    torch.manual_seed((seed * 1_000_003 + step) % 2**63)
