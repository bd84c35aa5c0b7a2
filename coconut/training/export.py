"""RUN/stage_K/ and RUN/final/: folders that plain transformers loads, replaced as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from coconut.model import MultimodalCoconut
from coconut.training.engine import gathered_state_dict
from coconut.training.run_folder import DONE_FILE, is_stage_done, replace_folder, set_aside, write_json
from coconut.training.state import TrainState
from coconut.types import CheckpointError
from coconut.utils.distributed import is_main_process, on_main_first
from coconut.utils.logging import get_logger

logger = get_logger(__name__)


def export_model(engine: Any, model: MultimodalCoconut, processors: list[Any], final: Path) -> None:
    """Write weights, configuration and `processors` (tokenizer ...) to `final`; every rank must call it.

    Raises:
        CheckpointError: on every rank, when the disk is full or not to be written; what was in `final` stays.
    """
    weights = gathered_state_dict(engine)
    on_main_first(lambda: _write(model, weights, processors, final))


def _write(model: MultimodalCoconut, weights: dict[str, Tensor], processors: list[Any], final: Path) -> None:
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=weights)
        for processor in processors:
            processor.save_pretrained(partial)
        replace_folder(partial, final)
    except (OSError, SafetensorError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        shutil.rmtree(partial, ignore_errors=True)
        text = f"{final} could not be written ({said}). Checkpoints are untouched"
        raise CheckpointError(f"{text}: make room, and the same command goes on from the last of them") from error


def best_name(stage: int) -> str:
    """The folder of a stage's best model, beside stage_K, which holds its last."""
    return f"stage_{stage}_best"


def settle_best(run_dir: Path, stage: int, best_step: int) -> None:
    """Move a stage's best model aside if it is another than the run knows of, at the stage's end.

    A process that died may have left one of a later step, which the next did not come to in the same way.
    """
    found = exported_step(run_dir / best_name(stage))
    if found not in (-1, best_step):
        folder = set_aside(run_dir, (best_name(stage),))
        logger.warning(
            "the best of stage %d was at step %d; that of step %d is now in %s", stage, best_step, found, folder
        )


def exported_step(final: Path) -> int:
    """Optimizer steps of the model in `final`; -1 when there is none."""
    try:
        return int(json.loads((final / "coconut.json").read_text())["metadata"]["state"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def mark_stage_done(run_dir: Path, stage: int, state: TrainState) -> None:
    """RUN/stage_K/done.json: written last, so that what waits for the stage finds its checkpoint as well."""
    if is_main_process() and (run_dir / f"stage_{stage}").is_dir() and not is_stage_done(run_dir, stage):
        done = {"stage": stage, "step": state.step, "samples": state.samples}
        write_json(run_dir / f"stage_{stage}" / DONE_FILE, done)
