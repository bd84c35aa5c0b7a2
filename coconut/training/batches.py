"""How many samples an optimizer step takes: fixed at the first start, stage by stage, on however many ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from coconut.config.deepspeed import BatchGeometry, batch_geometry
from coconut.training.state import TrainState
from coconut.types import STAGED_METHODS, ConfigError
from coconut.utils.distributed import get_world_size
from coconut.utils.logging import get_logger

logger = get_logger(__name__)

BATCH_KEYS = ("batch_size_training", "gradient_accumulation_steps", "global_batch_size")


def stage_batch(config: Any, stage: int) -> SimpleNamespace:
    """The keys that decide an optimizer step, as they hold in one stage (where the method has several)."""
    if config.method not in (*STAGED_METHODS, "cot"):
        return SimpleNamespace(**{key: getattr(config, key) for key in BATCH_KEYS})
    own = min(stage, config.max_latent_stage)
    return SimpleNamespace(**{key: config.stage_setting(own, key) for key in BATCH_KEYS})


def stage_geometry(config: Any, stage: int, state: TrainState) -> BatchGeometry:
    """The step of a stage as it was at the run's first start, since the data order hangs on it: the same samples, and
    with balance=cost the same slots, over however many ranks.

    Args:
        config: the run configuration.
        stage: which one.
        state: ``group`` says how many ranks the run was started on, 0 a new run; ``samples_per_step`` and ``slots``
            what the step of the stage in progress was.

    Raises:
        ConfigError: the configuration asks for another step than the stage in progress was begun with.
    """
    settings, world = stage_batch(config, stage), get_world_size()
    at_first = batch_geometry(settings, state.group or world)
    samples = at_first.samples
    if stage == state.stage and state.samples_per_step:
        _require_same(config, state, at_first, settings.global_batch_size)
        samples = state.samples_per_step
    if config.balance == "cost":
        return at_first.over(world)
    if samples != batch_geometry(settings, world).samples:
        logger.info("an optimizer step goes on to take %d samples, now over %d rank(s)", samples, world)
        micro_batch = min(settings.batch_size_training, samples)
        settings = SimpleNamespace(
            global_batch_size=samples, gradient_accumulation_steps=1, batch_size_training=micro_batch
        )
    return batch_geometry(settings, world)


def _require_same(config: Any, state: TrainState, at_first: BatchGeometry, whole: int | None) -> None:
    as_begun = (state.slots or at_first.slots, state.samples_per_step)
    if config.balance == "cost" and as_begun != (at_first.slots, at_first.samples):
        raise ConfigError(
            f"the run was started with {as_begun[0]} micro-batches an optimizer step over {state.group} rank(s), of "
            f"{as_begun[1]} samples together, and the configuration asks for {at_first.slots} over as many, of "
            f"{at_first.samples}; set batch_size_training, gradient_accumulation_steps and global_batch_size back, or "
            "start anew with resume=none"
        )
    if whole is not None and state.samples_per_step != at_first.samples:
        raise ConfigError(
            f"the run was started with {state.samples_per_step} samples an optimizer step, and global_batch_size asks "
            f"for {at_first.samples}; set global_batch_size={state.samples_per_step}, or start anew with resume=none"
        )


def set_geometry(engine: Any, geometry: BatchGeometry) -> None:
    """Let the engine count another number of micro-batches to a step; between two steps, on every rank."""
    if engine.gradient_accumulation_steps() != geometry.accumulation:
        whole = geometry.micro_batch * geometry.accumulation * get_world_size()
        engine.set_train_micro_batch_size(geometry.micro_batch)
        engine.set_train_batch_size(whole)
        # The optimizer keeps a copy, where it offloads; and a step is taken where accumulation divides the count.
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = geometry.accumulation
        engine.micro_steps = engine.global_steps * geometry.accumulation
