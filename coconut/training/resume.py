"""How a run begins: who holds its folder, which checkpoint it goes on from, and where it is to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coconut.config import load_config
from coconut.training.bad_samples import BAD_SAMPLES_FILE
from coconut.training.checkpoint import Checkpoint, CheckpointFolder, fault_of, read_checkpoint, refuse_other_run
from coconut.training.metrics import METRICS_FILE, MetricsWriter
from coconut.training.run_folder import CONFIG_FILE, hold_run, restore_replaced, set_aside
from coconut.training.stop import StopRequests
from coconut.types import CheckpointError, ConfigError
from coconut.utils.distributed import on_main_first
from coconut.utils.logging import get_logger

logger = get_logger(__name__)

#: What a run keeps from its first step to its last; a checkpoint written with other values is of another run.
FIXED_SETTINGS = (
    "seed", "method", "c_thought", "max_latent_stage", "pad_latent_to_max", "model_id", "load_model_path",
    "train_data_path", "max_train_samples", "samples_per_epoch", "balance", "image_size",
    "max_num_patches", "use_thumbnail", "dynamic_preprocess", "prompt_format", "bf16", "fp16", "latent_feedback",
    "latent_passes",
    "jacobi_iterations", "auxiliary_losses", "icot_tokens", "icot_smoothing", "start_stage",
    "freeze", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules",
)  # fmt: skip


#: What a start is asked for, not what the run is.
_OF_ONE_START = ("resume", "stop_after_stage")


def fixed_settings(config: Any) -> dict[str, Any]:
    """The settings that make a configuration's run the same run."""
    # None: as in checkpoints that were written before there were such keys.
    costs = {name: getattr(config, name) or None for name in ("cost_per_patch", "cost_per_latent_pass")}
    own = {str(stage): table["train_data_path"] for stage, table in config.stages.items() if "train_data_path" in table}
    stages = range(config.max_latent_stage + 1)
    of_stages: dict[str, Any] = {
        "stages.c_thought": [config.stage_setting(stage, "c_thought") for stage in stages],
        "stages.uniform_prob": [config.stage_setting(stage, "uniform_prob") for stage in stages],
    }
    return (
        {name: getattr(config, name) for name in FIXED_SETTINGS}
        | of_stages
        | costs
        | {"stages.train_data_path": own or None}
    )


def check_same_run(config: Any) -> None:
    """Raises ConfigError where the run folder's own configuration is of another run."""
    path = config.run_dir / CONFIG_FILE
    if path.exists():
        refuse_other_run(config.run_dir, fixed_settings(load_config(path, validate=False)), fixed_settings(config))


def say_changes(run_dir: Path, config: Any) -> None:
    """Name the settings that a run goes on with other values of than it had before; those it may change."""
    path = run_dir / CONFIG_FILE
    if not path.exists():
        return
    before = load_config(path, validate=False).to_dict()
    changed = [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in config.to_dict().items()
        if name not in _OF_ONE_START and before.get(name) != value
    ]
    if changed:
        logger.info("settings that are other than when the run was last started: %s", "; ".join(changed))


def take_run(run_dir: Path) -> None:
    """Hold the run folder, and tidy up what the process before this one left half done or asked for."""
    if hold_run(run_dir):
        StopRequests(run_dir).clear()
        restore_replaced(run_dir)
        restore_replaced(run_dir / "checkpoints")


def last_stage(stop_after_stage: int | None, stages: list[int]) -> int:
    """The stage after which a run ends.

    Raises:
        ConfigError: `stop_after_stage` is none of the run's stages.
    """
    if stop_after_stage is None:
        return stages[-1]
    if stop_after_stage not in stages:
        raise ConfigError(f"stop_after_stage = {stop_after_stage}: this run has the stages {stages[0]} to {stages[-1]}")
    return stop_after_stage


def check_start(config: Any, stages: list[int]) -> None:
    """What can be said of a run's start and end before a weight is loaded. Every rank must call it.

    Raises:
        CheckpointError: `resume` names a folder that is no checkpoint.
        ConfigError: it is of a run with other settings, or `stop_after_stage` is none of the run's `stages`.
    """
    last_stage(config.stop_after_stage, stages)
    if config.resume not in ("auto", "none"):
        on_main_first(lambda: read_checkpoint(Path(config.resume), fixed_settings(config)))


def find_start(checkpoints: CheckpointFolder, resume: str, *, look_only: bool = False) -> Checkpoint | None:
    """The checkpoint that `resume` (auto, none or a path) asks for; None to start anew. Every rank must call it.

    What would be in the way is moved, not deleted.

    Args:
        look_only: leave everything as it is.

    Raises:
        CheckpointError: what was asked for is damaged.
        ConfigError: it is of a run with other settings.
    """
    newest = checkpoints.newest_valid(look_only) if resume == "auto" else None
    folder = newest if resume in ("auto", "none") else Path(resume)
    if folder is not None and resume != "auto" and (fault := fault_of(folder)):
        raise CheckpointError(f"resume = {resume}: {fault}; resume=auto takes the newest checkpoint that is whole")
    if look_only:
        return on_main_first(lambda: None if folder is None else read_checkpoint(folder, checkpoints.run))
    return on_main_first(lambda: _make_room(checkpoints, folder))


def _make_room(checkpoints: CheckpointFolder, folder: Path | None) -> Checkpoint | None:
    run_dir = checkpoints.folder.parent
    if folder is None:
        old = set_aside(run_dir, ("checkpoints", "stage_*", "final", "tensorboard", METRICS_FILE, BAD_SAMPLES_FILE))
        if old is not None:
            logger.info("what an earlier run left in %s is now in %s", run_dir, old)
        return None
    found = read_checkpoint(folder, checkpoints.run)
    newer = [other.name for other in checkpoints.folder.glob("step-*") if other.name > folder.name]
    if newer:  # else the next start would take them for the newest
        old = set_aside(checkpoints.folder, newer)
        logger.warning("going back to %s: %s moved to %s", folder.name, ", ".join(sorted(newer)), old)
    MetricsWriter(run_dir).rewind(found.state.step)
    logger.info("going on from %s: stage %d, step %d", folder, found.state.stage, found.state.step)
    return found
