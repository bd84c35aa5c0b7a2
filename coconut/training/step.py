"""One optimizer step on all ranks: what it consists of, and whether its update may be applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from coconut.utils.distributed import all_reduce_sum, get_rank, get_world_size

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
    cells: int = 0  # rows x columns of the batches: tokens and padding
    costliest: float = 0.0  # cost of the costliest rank of each micro-step, added up; in tokens, as the mean
    mean_cost: float = 0.0  # cost of a rank on average


def agree(
    micro_batches: Sequence[Batch],
    stops: StopRequests,
    report: BadSampleReport,
    checkpoints: CheckpointFolder,
    cost: Callable[[Batch], float],
    accumulation: int,
) -> StepPlan:
    """Add up what the ranks bring, and whether one of them was asked to stop.

    Args:
        cost: of a micro-batch, in tokens.
        accumulation: micro-batches of a rank in a whole step.
    """
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
        "cells": sum(batch.tensors["input_ids"].numel() for batch in micro_batches if batch.keys),
    }
    # Each rank fills in its own places of a table, so that one sum tells every rank's costs to all.
    costs, first = [0.0] * (get_world_size() * accumulation), get_rank() * accumulation
    costs[first : first + len(micro_batches)] = map(cost, micro_batches)
    flags = stops.flags()
    sums = all_reduce_sum([*map(float, counts.values()), *flags, *costs])
    totals = {name: int(total) for name, total in zip(counts, sums, strict=False)}
    flags, costs = sums[len(counts) : -len(costs)], sums[-len(costs) :]
    return StepPlan(
        **totals,
        stop_reason=stops.reason(flags),
        costliest=sum(max(costs[number::accumulation]) for number in range(accumulation)),
        mean_cost=sum(costs) / get_world_size(),
    )


def batch_cost(batch: Batch, n_latent_columns: int, cost_per_patch: float, cost_per_latent_pass: float) -> float:
    """What a micro-batch costs as it is computed, in tokens: padding too, which the plan's costs know nothing of."""
    if not batch.keys:
        return 0.0
    rows, columns = batch.tensors["input_ids"].shape
    patches = int(batch.tensors["num_patches"].sum()) if "num_patches" in batch.tensors else 0
    return float(rows * (columns + cost_per_latent_pass * n_latent_columns) + cost_per_patch * patches)


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
        with explaining_memory(watchdog, config, batch):
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
