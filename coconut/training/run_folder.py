"""What holds for every file of a run folder: one run at a time, folders replaced as a whole, nothing deleted unasked.

RUN/.lock           held while a run lives; names its holder
RUN/stage_K/        the model after stage K; done.json in it is written last, once the stage's checkpoint is safe
RUN/old-1, old-2    what an earlier run left there
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from coconut.types import ConfigError

DONE_FILE = "done.json"
CONFIG_FILE = "config.yaml"  # of the last start

_held: dict[Path, TextIO] = {}  # run folders that this process holds, until it ends


def hold_run(run_dir: Path) -> bool:
    """Hold a run folder: a second run in it would mix its metrics and checkpoints with this one's.

    Returns:
        False where this process holds it already.

    Raises:
        ConfigError: another process holds it; the message names it. Or it cannot be written to.
    """
    key = run_dir.resolve()
    if key in _held:
        return False
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a+")
    except OSError as error:
        fix = "choose another save_path, or another name"
        raise ConfigError(f"the run folder {run_dir} cannot be written to: {error.strerror}; {fix}") from error
    try:
        # Not flock: processes forked from a rank, such as data workers, would hold that on after the rank's death.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "its name is not written yet"
        file.close()
        raise ConfigError(
            f"another run is writing to {run_dir} ({holder}); wait for it, or choose another name"
        ) from error
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}{f', SLURM job {job}' if job else ''}\n")
    file.flush()
    _held[key] = file
    return True


def holder_of(run_dir: Path) -> str | None:
    """Who else holds a run folder, in its own words; None where nobody does. Nothing is written."""
    lock = run_dir / ".lock"
    if run_dir.resolve() in _held or not lock.is_file():
        return None
    with lock.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return file.read().strip() or "its name is not written yet"
    return None


def is_stage_done(run_dir: Path, stage: int) -> bool:
    """Whether RUN/stage_K/ holds a stage that is complete, its checkpoint included."""
    return (run_dir / f"stage_{stage}" / DONE_FILE).is_file()


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in its place; what was there stays whole until then (`restore_replaced` finds it)."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Put back what `replace_folder` had moved out of the way when its process died between two renames."""
    for old in folder.glob(".*.old"):
        final = old.with_name(old.name[1 : -len(".old")])
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def set_aside(run_dir: Path, names: Sequence[str]) -> Path | None:
    """Move what an earlier run left under `names` into RUN/old-1, old-2 ...; nothing is deleted.

    Returns:
        the folder, or None where there was nothing to move.
    """
    found = [path for pattern in names for path in run_dir.glob(pattern)]
    if not found:
        return None
    number = 1
    while (target := run_dir / f"old-{number}").exists():
        number += 1
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return target


def write_json(path: Path, content: Any) -> None:
    """A JSON file that is there whole or not at all, also after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's renames, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
