"""`launch/train.py --dry-run`: everything but the steps, and what they would be.

configuration -> data -> model -> engine -> newest checkpoint, loaded -> each stage's plan -> the first step's batches

The trainer does all of this as for a run (`MultimodalCoTTrainer(..., is_dry=True)`); what is left out is what changes
the run folder. Written is RUN/log.txt alone: JSON data are made into shards in a temporary folder, which goes again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coconut.config.deepspeed import zero_stage
from coconut.training.batches import stage_geometry
from coconut.training.memory import shape_of
from coconut.training.run_folder import holder_of
from coconut.training.trainer import MultimodalCoTTrainer
from coconut.types import Batch
from coconut.utils.distributed import barrier, get_world_size, on_main_first
from coconut.utils.logging import get_logger

logger = get_logger(__name__)

#: A checkpoint holds weights and the two moments of every trained parameter, in float32.
CHECKPOINT_BYTES = 12


@contextmanager
def scratch_cache(config: Any) -> Iterator[None]:
    """Inside, shards go to a temporary folder of each machine; every rank must enter and leave."""
    folder = Path(on_main_first(lambda: tempfile.mkdtemp(prefix="coconut-dry-run-")))
    folder.mkdir(exist_ok=True)  # on machines that do not share the main process's disk
    config.update(shard_cache=str(folder))
    try:
        yield
        barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def dry_run(trainer: MultimodalCoTTrainer) -> None:
    """Get ready, and log what a run would do; every rank must call it.

    Raises:
        CoconutError: what a run would fail with before its first step.
    """
    engine, config, stages = trainer.engine, trainer.config, trainer.stages
    state = trainer.state
    first = state.stage + state.stage_done
    logger.info("dry run: nothing but this log is written")
    for line in (_run(trainer), _model(trainer, engine), _data(trainer), _step(trainer)):
        logger.info(line)
    if first > trainer.last_stage or trainer.out_of_budget():
        logger.info("nothing is left to train in %s", trainer.run_dir)
        return
    epoch = state.epoch
    for stage in (stage for stage in stages.stages if first <= stage <= trainer.last_stage):
        settings, spec = stages.settings(stage), stages.spec(stage)
        geometry = stage_geometry(config, stage, state)
        loader = trainer.inputs.train_loader(stage, epoch, 0, geometry, state.group)
        length = f"{settings.epochs} epochs" if settings.steps is None else f"{settings.steps} steps, in epochs"
        logger.info(
            "stage %d: %d thoughts; at most %s of %d steps of %d samples; learning rate %g after %d steps of warm-up",
            stage, spec.n_latents, length, len(loader.plan), geometry.samples, settings.learning_rate,
            settings.warmup_steps,
        )  # fmt: skip
        epoch += settings.epochs or -(-(settings.steps or 0) // max(len(loader.plan), 1))
    if config.max_steps is not None:
        logger.info("max_steps ends the run after step %d, in whatever stage", config.max_steps)
    start = 0 if state.stage_done else state.epoch_step
    geometry = stage_geometry(config, first, state)
    loader = trainer.inputs.train_loader(first, state.epoch, start, geometry, state.group)
    batches = list(_first_step(loader))
    logger.info("the first step (stage %d, step %d of its epoch), this rank's part:", first, start + 1)
    for batch in batches:
        logger.info("  %s", _batch(trainer, batch))


def _run(trainer: MultimodalCoTTrainer) -> str:
    config, state = trainer.config, trainer.state
    if state.step:
        text = f"run {trainer.run_dir}: goes on after step {state.step}, in stage {state.stage}"
    elif config.resume == "none" and any(trainer.run_dir.glob("checkpoints/step-*")):
        text = f"run {trainer.run_dir}: starts anew; what is there would be moved to old-N"
    else:
        text = f"run {trainer.run_dir}: starts at its first step"
    holder = on_main_first(lambda: holder_of(trainer.run_dir))
    return text + (f"; now it would be refused, as another run holds the folder ({holder})" if holder else "")


def _model(trainer: MultimodalCoTTrainer, engine: Any) -> str:
    parameters = list(trainer.model.parameters())
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
    trained = sum(size for size, parameter in zip(sizes, parameters, strict=True) if parameter.requires_grad)
    config = trainer.config
    stage = zero_stage(config.deepspeed) if config.deepspeed else 0
    return (
        f"model {type(trainer.model.base_model).__name__}: {sum(sizes):,} parameters, {trained:,} of them trained, in "
        f"{config.dtype}{', activations recomputed' if config.gradient_checkpointing else ''}; "
        f"{get_world_size()} ranks, ZeRO stage {stage} ({type(engine.optimizer).__name__}); a checkpoint takes "
        f"{CHECKPOINT_BYTES * trained / 2**30:.2f} GiB"
    )


def _data(trainer: MultimodalCoTTrainer) -> str:
    inputs = trainer.inputs
    splits = {"train": inputs.train, "validation": inputs.validation, "test": inputs.test}
    return "data: " + ", ".join(f"{name} {len(split):,} samples" for name, split in splits.items() if split is not None)


def _step(trainer: MultimodalCoTTrainer) -> str:
    geometry = trainer.geometry
    return (
        f"a step: {geometry.samples} samples in {geometry.slots} micro-batches, {geometry.accumulation} on each rank "
        f"one after the other"
    )


def _first_step(loader: Any) -> Iterator[Batch]:
    for number, batch in enumerate(loader, 1):
        yield batch
        if number == loader.accumulation:
            return


def _batch(trainer: MultimodalCoTTrainer, batch: Batch) -> str:
    if not batch.keys:
        return "an empty micro-batch: there are fewer samples than slots"
    tensors = batch.tensors
    columns = trainer.model.thought_columns(tensors["input_ids"], tensors["attention_mask"])
    more = len(batch.keys) - 4
    return (
        f"{shape_of(batch)}; {batch.n_tokens} tokens, {batch.n_label_tokens} of them labels; {len(columns) + 1} "
        f"passes; samples {', '.join(batch.keys[:4])}{f' and {more} more' if more > 0 else ''}"
    )
