"""Checkpoints of a run: a DeepSpeed folder and our state, committed by a rename.

RUN/checkpoints/step-00001250/engine/...      weights and optimizer, written by DeepSpeed on every rank
RUN/checkpoints/step-00001250/state.json      TrainState; written last, so a folder without it is no checkpoint
RUN/checkpoints/.step-00001250.partial/       one that is being written, or whose writer died
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from coconut.training.state import TrainState
from coconut.types import CheckpointError
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
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

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
            content = {"state": state.to_dict(), "world_size": get_world_size()}
            write_durably(partial / STATE_FILE, json.dumps(content, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync_folder(self.folder)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        barrier()
        return final

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step-*/{STATE_FILE}"))

    def newest(self) -> Path | None:
        found = self.complete()
        return found[-1] if found else None


def load_checkpoint(engine: Any, folder: Path) -> TrainState:
    """Put weights, optimizer and state back; every rank must call it.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or was written by another number of ranks.
    """
    state, world_size = read_state(folder)
    if world_size != get_world_size():
        raise CheckpointError(
            f"{folder} was written by {world_size} ranks, this run has {get_world_size()}; start it with "
            f"{world_size}, or begin a new run from the weights alone with load_model_path"
        )
    loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE_TAG)
    if loaded is None:
        raise CheckpointError(f"{folder / ENGINE_TAG} holds no DeepSpeed checkpoint")
    return state


def read_state(folder: Path) -> tuple[TrainState, int]:
    """State and number of ranks of a checkpoint.

    Raises:
        CheckpointError: no such checkpoint, or its state cannot be read.
    """
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text())
        return TrainState.from_dict(content["state"]), int(content["world_size"])
    except OSError as error:
        raise CheckpointError(f"{folder} is no complete checkpoint: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def write_durably(path: Path, text: str) -> None:
    """Write a small file that is whole on disk when this returns."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
