"""What a run will need, computed from shapes: memory of a rank by part, tokens a step, steps an epoch, arithmetic.

    parameters, ZeRO stage, ranks      -> what lies there all the time: weights, master weights, moments, gradients
    micro-batch, by `simulation`       -> what comes and goes: activations, logits, cache, gradients on their way
    the moments that may be worst      -> backward, a bucket's reduction, the optimizer's step; the largest is the plan

The accounting of DeepSpeed's buffers follows its code (runtime/zero/stage_1_and_2.py, stage3.py) and is held against
measurement by `benchmarks/memory_plan.py`. Not counted: the framework itself (CUDA context, kernels, NCCL's buffers),
the allocator's waste, and host memory other than offloaded state.

Units: bytes of one rank's device, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn

from coconut.evaluation.flops import training_flops
from coconut.model import MultimodalCoconut
from coconut.training.plan_data import DataShape, StageShape
from coconut.training.simulation import BatchShape, simulate_deep

MASTER, MOMENTS = 4, 8  # bytes a parameter: float32 weights, and Adam's two float32 moments
#: DeepSpeed's defaults, where a file leaves these out (elements).
BUCKET, MAX_LIVE, PERSISTENT, SUB_GROUP = 5e8, 1e9, 1e5, 1e9


@dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed configuration memory hangs on; sizes in elements."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket: int = int(BUCKET)
    buckets: int = 1  # two where communication overlaps with the backward
    max_live: int = int(MAX_LIVE)
    persistent: int = int(PERSISTENT)

    @classmethod
    def from_ds_config(cls, resolved: dict[str, Any]) -> ZeroSettings:
        """From a configuration without "auto"."""
        zero = resolved.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        devices = {
            name: (zero.get(name) or {}).get("device", "none") for name in ("offload_optimizer", "offload_param")
        }
        return cls(
            stage=stage,
            offload_optimizer=devices["offload_optimizer"] != "none",
            offload_param=devices["offload_param"] != "none",
            reduce_bucket=int(zero.get("reduce_bucket_size", BUCKET)),
            # Stage 3 has one, whatever overlaps.
            buckets=2 if stage in (1, 2) and zero.get("overlap_comm", False) else 1,
            max_live=int(zero.get("stage3_max_live_parameters", MAX_LIVE)),
            persistent=int(zero.get("stage3_param_persistence_threshold", PERSISTENT)),
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a rank's device, by part, at the worst moment; and of its host where state is offloaded."""

    parts: dict[str, int]
    moment: str  # "backward", "reduction" or "optimizer step"
    host: int
    has_passes: bool  # the decoder is called once a thought
    is_gathered_whole: bool  # ZeRO-3: the latent loop holds the text model whole through its passes
    batch: BatchShape  # of those planned for, the one that needs most

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class PlannedModel:
    """A model and its largest micro-batches; each simulated once for all settings under which the same gradients stay.

    Args:
        model: on the meta device, what is frozen frozen; its dtype and checkpointing are set here.
        shapes: the largest micro-batch of each stage.
        dtype: of weights and activations.
        on_cpu: as a CPU does: torch's Adam takes one tensor at a time, and untouched buffers take no memory.
    """

    def __init__(
        self,
        model: MultimodalCoconut,
        *shapes: BatchShape,
        dtype: torch.dtype,
        checkpointing: bool,
        on_cpu: bool = False,
    ) -> None:
        model.base_model.to(dtype)
        if checkpointing:
            model.gradient_checkpointing_enable()
        self.model, self.dtype, self.on_cpu = model, dtype, on_cpu
        self.shapes = _undominated(shapes)
        self._simulated: dict[tuple[BatchShape, str], dict[str, int]] = {}

    def memory(self, ranks: int, zero: ZeroSettings) -> MemoryPlan:
        """The memory of one rank of `ranks`, with the micro-batch that needs most."""
        return max((self._memory(shape, ranks, zero) for shape in self.shapes), key=lambda plan: plan.total)

    def _memory(self, shape: BatchShape, ranks: int, zero: ZeroSettings) -> MemoryPlan:
        text = sum(parameter.numel() for parameter in self.model.text_parameters)
        is_leaf = zero.stage == 3 and text <= zero.max_live
        # DeepSpeed lets go of a module's weights when the backward of its last call is over: with thoughts, of all
        # the decoder's together, though the passes of the forward gather them one after the other.
        has_passes = shape.latents > 0 and self.model.loop.iterations != 0
        is_whole = is_leaf or has_passes
        state = _State(self.model, zero, ranks, self.dtype, is_whole, self.on_cpu)
        stay = "all" if zero.stage < 2 or state.fills_bucket else "decoder" if is_leaf else "none"
        if (shape, stay) not in self._simulated:
            self._simulated[shape, stay] = simulate_deep(self.model, shape, self._staying(stay))
        peak = self._simulated[shape, stay]
        moments = {"backward": state.in_backward(peak), "optimizer step": state.in_step()}
        if zero.stage == 3:
            moments["reduction"] = state.in_reduction(peak)
        worst = max(moments, key=lambda name: sum(moments[name].values()))
        return MemoryPlan(moments[worst], worst, state.host(), has_passes, is_leaf, shape)

    def _staying(self, stay: str) -> Callable[[nn.Parameter], bool]:
        """Whose gradients are whole until the backward ends: a leaf of ZeRO-3 lets go of all its weights together."""
        table = {id(parameter) for parameter in self.model.base_model.get_input_embeddings().parameters()}
        of_leaf = {id(parameter) for parameter in self.model.backbone.decoder.parameters()} - table
        return lambda parameter: stay == "all" or (stay == "decoder" and id(parameter) in of_leaf)


def _undominated(shapes: Sequence[BatchShape]) -> list[BatchShape]:
    """Without those that another one exceeds, or equals, in everything."""
    kept: list[BatchShape] = []
    for shape in sorted(set(shapes), key=astuple, reverse=True):  # what exceeds a shape comes before it
        if not any(all(a >= b for a, b in zip(astuple(other), astuple(shape), strict=True)) for other in kept):
            kept.append(shape)
    return kept


class _State:
    """What lies on a rank besides activations. A frozen weight has neither gradient nor optimizer state."""

    def __init__(
        self, model: MultimodalCoconut, zero: ZeroSettings, ranks: int, dtype: torch.dtype, is_whole: bool, on_cpu: bool
    ) -> None:
        self.zero, self.ranks, self.on_cpu = zero, ranks, on_cpu
        self.size = torch.empty(0, dtype=dtype).element_size()
        sizes = [parameter.numel() for parameter in model.parameters()]
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        self.n, self.n_trained, self.largest = sum(sizes), sum(trained), max(trained)
        self.partition = -(-self.n // ranks)  # of the weights, under ZeRO-3
        self.share = -(-self.n_trained // ranks) if zero.stage else self.n_trained  # of the optimizer's state
        self.small = sum(size for size in sizes if size <= zero.persistent)
        self.text = sum(parameter.numel() for parameter in model.text_parameters)
        self.is_whole = is_whole  # ZeRO-3: whether the backward holds the text model whole

    @property
    def weights(self) -> int:
        if self.zero.stage < 3:
            return self.size * self.n
        partition = 0 if self.zero.offload_param else self.size * self.partition
        return partition + self.size * self.small

    @property
    def gathered(self) -> int:
        """ZeRO-3: weights that are whole for a while, at most."""
        if self.zero.stage < 3:
            return 0
        whole = self.n - self.small
        return self.size * (min(self.text, whole) if self.is_whole else min(whole, self.zero.max_live))

    @property
    def optimizer(self) -> int:
        if self.zero.offload_optimizer:
            return 0
        master = MASTER if self.zero.stage or self.size < 4 else 0  # without ZeRO float32 weights are their own
        return (master + MOMENTS) * self.share

    @property
    def fills_bucket(self) -> bool:
        """On a CPU a bucket takes memory as gradients fill it; one that holds them all is as if they stayed."""
        return self.on_cpu and self.zero.stage in (1, 2) and self.n_trained <= self.zero.reduce_bucket

    @property
    def bucket(self) -> int:
        if self.zero.stage == 0 or self.fills_bucket:
            return 0
        if self.on_cpu:  # what the step before has touched
            return self.size * min(self.zero.reduce_bucket, self.n_trained) * self.zero.buckets
        return self.size * self.zero.reduce_bucket * self.zero.buckets

    @property
    def partition_gradients(self) -> int:
        """Reduced gradients that wait for the step."""
        if self.zero.stage < 2 or self.zero.offload_optimizer:
            return 0
        return self.size * self.share

    @property
    def waiting_gradients(self) -> int:
        """Those of earlier micro-batches, or of what the backward is past."""
        return 0 if self.fills_bucket else self.partition_gradients

    def in_backward(self, peak: dict[str, int]) -> dict[str, int]:
        return {
            "weights": self.weights,
            "gathered weights": self.gathered,
            "optimizer": self.optimizer,
            "gradients": peak["gradients"] + self.waiting_gradients + self.bucket,
            **{name: peak[name] for name in ("activations", "logits", "cache")},
        }

    def in_reduction(self, peak: dict[str, int]) -> dict[str, int]:
        """ZeRO-3 while a full bucket, or the last one, goes to its ranks: as the backward ends, activations are gone.

        The bucket's gradients are put in the order of the ranks (`reduce_scatter_coalesced`); gloo copies once more.
        """
        copied = self.size * min(self.zero.reduce_bucket, self.n_trained)
        copies = copied * (2 if self.on_cpu and self.ranks > 1 else 1)
        outside = 0 if self.n_trained <= self.zero.reduce_bucket else peak["gradients"]
        return {
            "weights": self.weights,
            "gathered weights": self.gathered,
            "optimizer": self.optimizer,
            "gradients": outside + self.partition_gradients + self.bucket + copies,
        }

    def in_step(self) -> dict[str, int]:
        whole = self.size * self.n_trained if self.zero.stage < 2 else self.partition_gradients
        flat = 0  # ZeRO steps on float32 gradients in one piece
        if self.zero.stage and not self.zero.offload_optimizer:
            flat = 4 * (min(self.share, int(SUB_GROUP)) if self.zero.stage == 3 else self.share)
        elif not self.zero.stage and self.size < 4:
            flat = 4 * self.n_trained
        stepped = self.largest if self.zero.stage == 0 else self.share
        if self.zero.offload_optimizer:
            working = 0
        elif self.on_cpu:
            working = 2 * MASTER * stepped  # a root and its quotient, of one tensor at a time
        else:
            working = MASTER * self.share  # torch's for-each kernels: the roots of all at once
        return {
            "weights": self.weights,
            "optimizer": self.optimizer + working,
            "gradients": whole + flat + self.bucket,
        }

    def host(self) -> int:
        """Bytes of this rank in host memory."""
        optimizer = (MASTER + MOMENTS + 4) * self.share if self.zero.offload_optimizer else 0
        return optimizer + (self.size * self.partition if self.zero.offload_param else 0)


@dataclass(frozen=True)
class WorkPlan:
    """One optimizer step over all ranks."""

    samples: int
    tokens: int  # padding not counted
    flops: float


def plan_work(model_config: Any, data: StageShape, *, checkpointing: bool) -> WorkPlan:
    """Arithmetic of a step (`coconut.evaluation.flops`: forward, backward, recomputation; all weights trained).

    Args:
        data: for the average sample, with as many thoughts as the stage has at most.
    """
    samples = data.step_samples
    tokens = round((data.tokens + data.largest.latents) * samples)
    flops = training_flops(
        model_config,
        tokens,
        round(data.tiles * samples),
        n_samples=samples,
        n_logit_tokens=round(data.labels * samples),
        recompute=checkpointing,
    )
    return WorkPlan(samples, tokens, float(flops))


def plan_text(
    model: MultimodalCoconut,
    memory: MemoryPlan,
    data: DataShape,
    ranks: int,
    zero: ZeroSettings,
    available_gb: float,
    work: Callable[[StageShape], WorkPlan],
) -> str:
    """The plan, for people."""
    batch = memory.batch
    worst = next(stage.stage for stage in data.stages if stage.largest == batch)
    offloads = [
        name for name, is_on in (("optimizer", zero.offload_optimizer), ("weights", zero.offload_param)) if is_on
    ]
    setting = f"ZeRO stage {zero.stage}" + (f", {' and '.join(offloads)} in host memory" if offloads else "")
    if zero.stage == 3:
        how = "layer by layer" + (", in every pass; the backward holds it whole" if memory.has_passes else "")
        if memory.is_gathered_whole:
            how = "whole, once a micro-batch"
        setting += f"; the text model is gathered {how}"
    lines = [
        f"computed, not measured; {data.source}",
        f"parameters            {count_parameters(model):,}, {count_parameters(model, trained=True):,} of them trained",
        f"ranks                 {ranks}, {setting}",
        f"largest micro-batch   {batch.rows} samples x {batch.columns} columns, {batch.latents} of them thoughts",
        f"                      {batch.tiles} image tiles, {batch.labels} label tokens; stage {worst}",
        f"memory of a rank      {memory.total / 1e9:.2f} GB, at the worst moment, the {memory.moment}:",
        *(f"    {part:18}{size / 1e9:9.2f} GB" for part, size in memory.parts.items() if size),
    ]
    if memory.host:
        lines.append(f"host memory           {memory.host / 1e9:.2f} GB for each rank")
    share = memory.total / (available_gb * 1e9)
    lines.append(f"    {share:.0%} of {available_gb:g} GB: " + ("fits" if share <= 1 else "does not fit"))
    groups = list(data.alike())
    for stages in groups:
        first, last = stages[0].stage, stages[-1].stage
        if len(groups) > 1:
            lines.append(f"stage {first}" if first == last else f"stages {first} to {last}")
        lines += _work_lines(max(stages, key=lambda stage: stage.largest.latents), work)
    return "\n".join(lines)


def _work_lines(stage: StageShape, work: Callable[[StageShape], WorkPlan]) -> Iterator[str]:
    step = work(stage)
    yield f"an optimizer step     {step.samples:,} samples, {step.tokens:,} tokens, {step.flops:.3g} operations"
    if stage.steps is not None and stage.samples is not None:
        total = step.flops * stage.samples / step.samples
        yield f"an epoch              {stage.samples:,} samples in {stage.steps:,} steps, {total:.3g} operations"


def count_parameters(model: nn.Module, *, trained: bool = False) -> int:
    """All of them, or those that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trained)
