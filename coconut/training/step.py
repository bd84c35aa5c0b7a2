"""One optimizer step on all ranks: what it consists of, and whether its update may be applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coconut.data.bad_samples import bad_samples_of
from coconut.model import MultimodalCoconut
from coconut.training.anomalies import guarded_update
from coconut.training.bad_samples import BadSampleReport
from coconut.training.checkpoint import CheckpointFolder
from coconut.training.memory import explaining_memory
from coconut.training.stop import StopRequests
from coconut.training.validation import to_device
from coconut.training.watchdog import Watchdog
from coconut.types import Batch
from coconut.utils.distributed import all_reduce_sum, get_world_size

#: Fault of a step of which no sample could be used: weights and moments stay, and nothing is wrong with the model.
NO_LABELS = "no label token"


@dataclass(frozen=True)
class StepPlan:
    """What all ranks together are about to do; the same on every rank."""

    batches: int
    label_tokens: int
    samples: int
    tokens: int
    patches: int
    bad_samples: int  # left out of these batches
    new_bad_samples: int  # of which the run's report does not name
    written: int  # ranks that have written their part of an unfinished checkpoint
    stop_reason: str | None  # why nobody takes this step


def agree(
    micro_batches: Sequence[Batch], stops: StopRequests, report: BadSampleReport, checkpoints: CheckpointFolder
) -> StepPlan:
    """Add up what the ranks bring, and whether one of them was asked to stop."""
    bad = bad_samples_of(micro_batches)
    counts = {
        "batches": len(micro_batches),
        "label_tokens": sum(batch.n_label_tokens for batch in micro_batches),
        "samples": sum(len(batch.keys) for batch in micro_batches),
        "tokens": sum(batch.n_tokens for batch in micro_batches),
        "patches": sum(int(b.tensors["num_patches"].sum()) for b in micro_batches if "num_patches" in b.tensors),
        "bad_samples": len(bad),
        "new_bad_samples": len(report.unnamed(bad)),
        "written": int(checkpoints.is_written),
    }
    sums = all_reduce_sum([*map(float, counts.values()), *stops.flags()])
    totals = {name: int(total) for name, total in zip(counts, sums, strict=False)}
    return StepPlan(**totals, stop_reason=stops.reason(sums[len(counts) :]))


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
            # A copy: without ZeRO, DeepSpeed 0.19.8 divides the gradient of the very tensor that forward returned by
            # the accumulation even so (its hook on that tensor comes before the one that would tell it not to).
            engine.backward(output.loss.clone(), scale_wrt_gas=False)
            loss_sum += float(output.loss.detach()) * labels / world
            watchdog.enter("optimizer step", batch.keys)
            if number == len(micro_batches):
                loss = all_reduce_sum([loss_sum])[0] / labels
                fault = judge(loss) if plan.label_tokens else NO_LABELS
            with guarded_update(engine, drop=fault is not None):
                engine.step()
    # With fp16 an overflow is how the loss scale is found; DeepSpeed counts those.
    if fault is None and not engine.was_step_applied() and not config.fp16:
        fault = "non-finite gradient"
    return StepResult(loss_sum, loss, fault)


def seed_step(seed: int, step: int) -> None:
    """Draws such as dropout depend on the step alone, so that a resumed run repeats them."""
    torch.manual_seed((seed * 1_000_003 + step) % 2**63)
