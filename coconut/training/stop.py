"""Stopping a run from outside: RUN/stop, SIGTERM or SIGUSR1; seen by one rank, agreed by all at a step boundary.

A signal handler only takes a note: it may run in the middle of a collective or of a save. The trainer adds the
notes of all ranks to the sums that open each step, writes a checkpoint, and RUN/stopped.json {stage, step, reason}.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coconut.training.run_folder import write_json
from coconut.utils.distributed import is_main_process

STOP_FILE = "stop"
STOPPED_FILE = "stopped.json"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REASONS = ("stop file", *(number.name for number in SIGNALS))

_noted: set[str] = set()  # signals that this process got


@contextmanager
def noting_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 are noted in place of ending the process; outside of the main thread, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: Any) -> None:
    _noted.add(signal.Signals(number).name)


class StopRequests:
    """What asks the run in `run_dir` to stop."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def flags(self) -> list[float]:
        """This rank's view, one number a reason; add them up over the ranks and give the sums to `reason`."""
        # One rank looks for the file: a shared disk shows it to others earlier or later.
        has_file = is_main_process() and (self.run_dir / STOP_FILE).exists()
        return [float(has_file), *(float(name in _noted) for name in REASONS[1:])]

    def reason(self, sums: Sequence[float]) -> str | None:
        """Why all ranks stop now; None to go on."""
        found = [name for name, count in zip(REASONS, sums, strict=True) if count]
        return ", ".join(found) or None

    def clear(self) -> None:
        """Forget what stopped the run before this one."""
        _noted.clear()
        for name in (STOP_FILE, STOPPED_FILE):
            (self.run_dir / name).unlink(missing_ok=True)

    def write(self, stage: int, step: int, reason: str) -> None:
        """RUN/stopped.json, once the checkpoint is safe."""
        if is_main_process():
            write_json(self.run_dir / STOPPED_FILE, {"stage": stage, "step": step, "reason": reason})
