"""Checkpoints of a run, committed as a whole and checked before they are trusted.

RUN/checkpoints/step-00001250/rank-00000.safetensors ...   weights and optimizer, each rank's pieces (pieces.py)
RUN/checkpoints/step-00001250/state.json                   TrainState, counters, settings
RUN/checkpoints/step-00001250/manifest.json                size and SHA-256 of each file; written last
RUN/checkpoints/.step-00001250.partial/                    one that is being written, or whose writer died

copy in memory  | write in .partial -> fsync | manifest of every rank's sums -> fsync -> rename -> remove the old
a step boundary | a thread of each rank      | the step boundary that finds every rank's thread done
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from coconut.training.pieces import PiecesCopy, copy_pieces, engine_numbers, local_bytes, read_pieces, world_note
from coconut.training.run_folder import replace_folder, sync, write_json
from coconut.training.state import TrainState
from coconut.types import CheckpointError, ConfigError
from coconut.utils.distributed import (
    all_gather_object,
    all_reduce_sum,
    get_rank,
    get_world_size,
    is_main_process,
    on_main_first,
)
from coconut.utils.logging import get_logger

logger = get_logger(__name__)

T = TypeVar("T")

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
#: What reading a damaged file raises. Not RuntimeError, which is what a rank gets whose neighbour died.
UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError)
NOT_VALIDATED = float("-inf")
SPARE_BYTES = 1 << 20  # headers, state and manifest


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself, without its tensors."""

    folder: Path
    state: TrainState
    numbers: dict[str, Any]  # the engine's counters and loss scale


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint that is being written; it becomes one when every rank's file is on the disk."""

    partial: Path
    final: Path
    content: dict[str, Any]  # of state.json, as it was at the step boundary
    own_file: Future[dict[str, Any]]  # name -> sum of this rank's file


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        keep: how many of the newest stay, besides the best of the newest stage.
        run: settings that a run has to share with the checkpoint it goes on from.
    """

    def __init__(self, folder: Path, keep: int, run: dict[str, Any]) -> None:
        self.folder = folder
        self.keep = keep
        self.run = run
        self.saved: dict[str, Any] | None = None  # the state in the newest that this process completed
        self._unfinished: Unfinished | None = None
        # Joined when the interpreter ends: a write that was begun is not cut off by a run that ends in an error.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, engine: Any, state: TrainState, score: float | None = None) -> Path:
        """Write a checkpoint; every rank must call it. Nothing older is touched until it is complete.

        Args:
            score: of a validation of these weights, which decides what the best checkpoint is; higher is better.

        Raises:
            CheckpointError: on every rank, when the disk is too full or a rank cannot write.
        """
        final = self.begin(engine, state, score)
        self.finish()
        return final

    def begin(self, engine: Any, state: TrainState, score: float | None = None) -> Path:
        """The first half of `save`: copy what there is to write, and leave the writing to a thread.

        Training may go on at once. An earlier one that is still being written is finished first.

        Raises:
            CheckpointError: on every rank, when the disk is too full.
        """
        self.settle()
        final = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        on_main_first(lambda: _or_checkpoint_error(lambda: self._make_room(partial), final))
        try:
            self._need_space(sum(all_reduce_sum([float(local_bytes(engine))])), final)
        except CheckpointError:
            _remove(partial)
            raise
        content = {
            "state": deepcopy(state.to_dict()),
            "world_size": get_world_size(),
            "run": self.run,
            "engine": engine_numbers(engine),
            "score": score,
        }
        own_file = self._writer.submit(_write_file, copy_pieces(engine), partial)
        self._unfinished = Unfinished(partial, final, content, own_file)
        return final

    @property
    def is_written(self) -> bool:
        """Whether this rank has done its part of a checkpoint that is not finished yet."""
        return self._unfinished is not None and self._unfinished.own_file.done()

    def finish(self) -> Path | None:
        """The second half of `save`: wait for every rank's file, and make it a checkpoint; every rank must call it.

        Returns:
            the checkpoint; None where none was being written.

        Raises:
            CheckpointError: on every rank, when a rank could not write.
        """
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            return None
        partial, final, content = unfinished.partial, unfinished.final, unfinished.content
        try:
            files = _gather_sums(unfinished.own_file, final)
        except CheckpointError:
            _remove(partial)
            raise
        on_main_first(lambda: _or_checkpoint_error(lambda: self._commit(partial, final, files, content), final))
        self.saved = content["state"]
        return final

    def settle(self) -> None:
        """As `finish`, for a checkpoint that training can do without: that it failed is logged."""
        try:
            if (path := self.finish()) is not None:
                logger.info("complete: %s", path)
        except CheckpointError as error:
            logger.warning("training goes on without a checkpoint: %s", error)

    def _make_room(self, partial: Path) -> None:
        self._prune()  # a run that is told to keep fewer than before may need their place
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def _need_space(self, n_bytes: float, final: Path) -> None:
        free = on_main_first(lambda: shutil.disk_usage(self.folder).free)
        needed = n_bytes + SPARE_BYTES
        if free < needed:
            raise CheckpointError(
                f"{final} needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free; remove something, or "
                f"set a smaller max_checkpoints (now {self.keep}). Older checkpoints are untouched"
            )

    def _commit(self, partial: Path, final: Path, files: dict[str, Any], content: dict[str, Any]) -> None:
        write_json(partial / STATE_FILE, content)
        files[STATE_FILE] = _sum_of(partial / STATE_FILE)
        write_json(partial / MANIFEST_FILE, {"files": files})
        replace_folder(partial, final)
        self._prune(final)

    def _prune(self, newest: Path | None = None) -> None:
        """Remove what is too old; `newest` was just written, and stays even where its step is lower."""
        found = self.complete()
        best = max(found, key=_goodness, default=None)
        if best is not None and _goodness(best)[1] == NOT_VALIDATED:
            best = None
        for old in found[: -self.keep]:
            if old not in (newest, best):
                doomed = old.with_name(f".{old.name}.partial")  # so that a half removed one is no checkpoint
                old.rename(doomed)
                shutil.rmtree(doomed)

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first; their files are not checked."""
        found = (path.parent for path in self.folder.glob(f"step-*/{MANIFEST_FILE}"))
        return sorted(path for path in found if path.name[5:].isdecimal())

    def newest_valid(self, look_only: bool = False) -> Path | None:
        """The newest checkpoint whose files are what their writers wrote; every rank must call it.

        Says why it passed over others. None where there are no checkpoints at all. One that this process is still
        writing is finished first.

        Args:
            look_only: leave unfinished ones where they are.

        Raises:
            CheckpointError: there are some, and all are damaged.
        """
        self.settle()
        names = on_main_first(lambda: self._candidates(look_only))
        for name in names:
            fault = fault_of(self.folder / name)
            if fault is None:
                return self.folder / name
            logger.warning("passing over %s: %s", self.folder / name, fault)
        if names:
            raise CheckpointError(
                f"none of the {len(names)} checkpoint(s) in {self.folder} is whole (see the warnings above); "
                "resume=none starts anew and moves them aside"
            )
        return None

    def _candidates(self, look_only: bool) -> list[str]:
        for left_over in self.folder.glob(".step-*.partial"):
            done = "a run would remove it" if look_only else "removed"
            logger.warning("passing over %s: its writer died before it was complete; %s", left_over, done)
            if not look_only:
                shutil.rmtree(left_over, ignore_errors=True)
        # Ours alone: a copy or a link with a name of its own (step-best) is no newest one.
        return sorted((p.name for p in self.folder.glob("step-*") if p.name[5:].isdecimal()), reverse=True)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; the ranks share the reading, and all must call this."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        share = sorted(files)[get_rank() :: get_world_size()]
        faults = [fault for name in share if (fault := _file_fault(folder / name, files[name]))]
    except FileNotFoundError as error:
        faults = [f"{Path(error.filename).name} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        faults = [f"{MANIFEST_FILE} is damaged: {error!r}"]
    found = [fault for of_rank in all_gather_object(faults) for fault in of_rank]
    return found[0] if found else None


def _file_fault(path: Path, expected: dict[str, Any]) -> str | None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes, {expected['bytes']} were written"
    if _sum_of(path) != expected:
        return f"{path.name} has another SHA-256 than when it was written"
    return None


def _sum_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _remove(partial: Path) -> None:
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)


def _write_file(pieces: PiecesCopy, partial: Path) -> dict[str, Any]:
    """Write this rank's file; returns its name and sum."""
    path = pieces.write(partial)
    sync(path)
    return {path.name: _sum_of(path)}


def _gather_sums(own_file: Future[dict[str, Any]], final: Path) -> dict[str, Any]:
    """Name and sum of every rank's file, once all are on the disk."""
    entry: dict[str, Any] = {}
    fault = None
    try:
        entry = own_file.result()
    except (OSError, SafetensorError) as error:
        fault = f"rank {get_rank()}: {error}"
    gathered = all_gather_object((entry, fault))
    faults = [fault for _, fault in gathered if fault]
    if faults:
        raise CheckpointError(f"{final} could not be written ({'; '.join(faults)}). Older checkpoints are untouched")
    return {name: found for files, _ in gathered for name, found in files.items()}


def _or_checkpoint_error(action: Callable[[], T], final: Path) -> T:
    try:
        return action()
    except OSError as error:
        raise CheckpointError(f"{final} could not be written ({error}). Older checkpoints are untouched") from error


def _goodness(folder: Path) -> tuple[int, float]:
    """Scores of different stages are of different tasks: the newest stage comes first."""
    try:
        content = json.loads((folder / STATE_FILE).read_text())
        return int(content["state"]["stage"]), NOT_VALIDATED if content["score"] is None else float(content["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1, NOT_VALIDATED  # damaged, so not the best


def read_checkpoint(folder: Path, run: dict[str, Any]) -> Checkpoint:
    """What is in a checkpoint, once it is clear that this run may go on from it. Reads no weights.

    Args:
        folder: a complete checkpoint.
        run: the settings of this run, to be compared with the checkpoint's.

    Raises:
        CheckpointError: no such checkpoint, or its state cannot be read.
        ConfigError: it belongs to a run with other settings.
    """
    path = folder / STATE_FILE
    try:
        content = json.loads(path.read_text())
        state, numbers, written_for = dict(content["state"]), dict(content["engine"]), dict(content["run"])
    except OSError as error:
        raise CheckpointError(f"{folder} is no complete checkpoint: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; remove {folder} to go on without it") from error
    refuse_other_run(folder, written_for, run)
    return Checkpoint(folder, TrainState.from_dict(state), numbers)


def refuse_other_run(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError where settings that make a run differ from those that `folder` was written for."""
    differences = [f"{k} was {before.get(k)!r} and is {v!r}" for k, v in now.items() if before.get(k) != v]
    if differences:
        raise ConfigError(
            f"{folder} is of another run: {'; '.join(differences)}. Put these back, choose another name, or start anew "
            "with resume=none"
        )


def load_checkpoint(engine: Any, checkpoint: Checkpoint) -> None:
    """Put weights and optimizer back, whatever ranks and ZeRO stage wrote them; every rank must call it.

    Raises:
        CheckpointError: the files are damaged, or of another model.
    """
    try:
        read_pieces(engine, checkpoint.folder, checkpoint.numbers)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; remove {checkpoint.folder} to go on from the one before") from error
    except UNREADABLE as error:
        raise CheckpointError(
            f"{checkpoint.folder} cannot be loaded ({type(error).__name__}: {error}); remove it to go on "
            "from the one before"
        ) from error
    logger.info("loaded %s%s", checkpoint.folder, world_note(checkpoint.folder))
