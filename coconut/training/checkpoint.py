"""Checkpoints of a run: a DeepSpeed folder and our state, committed by a rename.

RUN/checkpoints/step-00001250/engine/...      weights and optimizer, written by DeepSpeed on every rank
RUN/checkpoints/step-00001250/state.json      TrainState; written last, so a folder without it is no checkpoint
RUN/checkpoints/.step-00001250.partial/       one that is being written, or whose writer died
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from coconut.training.run_folder import replace_folder, sync
from coconut.training.state import TrainState
from coconut.types import CheckpointError, ConfigError
from coconut.utils.distributed import barrier, get_world_size, is_main_process
from coconut.utils.logging import get_logger

logger = get_logger(__name__)

STATE_FILE = "state.json"
ENGINE_TAG = "engine"


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        keep: how many of the newest stay.
        run: settings that a run has to share with the checkpoint it goes on from.
    """

    def __init__(self, folder: Path, keep: int, run: dict[str, Any]) -> None:
        self.folder = folder
        self.keep = keep
        self.run = run

    def save(self, engine: Any, state: TrainState) -> Path:
        """Write a checkpoint; every rank must call it. Nothing older is touched until it is complete."""
        final = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        # The tag is ours, so DeepSpeed's own `latest` file, written without fsync or rename, is not needed.
        engine.save_checkpoint(str(partial), tag=ENGINE_TAG, save_latest=False)
        barrier()
        if is_main_process():
            for path in partial.rglob("*"):
                sync(path)
            content = {"state": state.to_dict(), "world_size": get_world_size(), "run": self.run}
            (partial / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
            sync(partial / STATE_FILE)
            replace_folder(partial, final)
            for old in self.complete()[: -self.keep]:
                if old != final:
                    shutil.rmtree(old)
        barrier()
        return final

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step-*/{STATE_FILE}"))

    def newest(self) -> Path | None:
        found = self.complete()
        return found[-1] if found else None


def read_checkpoint(folder: Path, run: dict[str, Any]) -> TrainState:
    """The state in a checkpoint, once it is clear that this run may go on from it. Reads no weights.

    Args:
        folder: a complete checkpoint.
        run: the settings of this run, to be compared with the checkpoint's.

    Raises:
        CheckpointError: no such checkpoint, its state cannot be read, or another number of ranks wrote it.
        ConfigError: it belongs to a run with other settings.
    """
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text())
        state, world_size, written_for = content["state"], int(content["world_size"]), dict(content["run"])
    except OSError as error:
        raise CheckpointError(f"{folder} is no complete checkpoint: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; remove {folder} to go on without it") from error
    differences = [f"{k} was {written_for.get(k)!r} and is {v!r}" for k, v in run.items() if written_for.get(k) != v]
    if differences:
        raise ConfigError(
            f"{folder} is of another run: {'; '.join(differences)}. Put these back, choose another name, or start anew "
            "with resume=none"
        )
    if world_size != get_world_size():
        raise CheckpointError(
            f"{folder} was written by {world_size} rank(s), this run has {get_world_size()}; start it with "
            f"{world_size}, or begin a new run from the weights alone with load_model_path"
        )
    return TrainState.from_dict(state)


def load_checkpoint(engine: Any, folder: Path) -> None:
    """Put weights and optimizer back; every rank must call it.

    Raises:
        CheckpointError: the engine's files are damaged.
    """
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE_TAG)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AssertionError, UnpicklingError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded ({type(error).__name__}: {error}); remove it to go on from the one before"
        ) from error
    if loaded is None:
        raise CheckpointError(f"{folder / ENGINE_TAG} holds no DeepSpeed checkpoint; remove {folder} to go on without")
