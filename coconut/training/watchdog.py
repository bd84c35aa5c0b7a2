"""Ends a rank that makes no progress: says where it stands, dumps all Python stacks, and leaves.

A collective that another rank never joins waits for ever, or for half an hour; nobody looks at the screen. A scheduler
starts a process that ended again, and the run goes on from its last checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from coconut.utils.distributed import get_rank

#: Exit code of a rank that hung: "try again later" (sysexits.h).
EXIT_HANG = 75
MOST_KEYS = 8  # samples named in a message


class Watchdog:
    """Knows what this rank is doing, and since when.

    Args:
        timeout_s: longest time in one phase, in seconds; None only keeps track.
        run_dir: takes ``hang-rank-N.txt``.
    """

    def __init__(self, timeout_s: float | None, run_dir: Path) -> None:
        self.timeout_s, self.run_dir = timeout_s, run_dir
        self.phase, self.keys, self.step = "starting", (), 0  # type: tuple[str, Sequence[str], int]
        self._since = time.monotonic()
        self._end = threading.Event()

    def enter(self, phase: str, keys: Sequence[str] = ()) -> None:
        """A phase begins; the one before is over. `keys` are the samples it works on."""
        self.phase, self.keys, self._since = phase, keys, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._end.clear()
        self.enter("starting")
        if self.timeout_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def where(self) -> str:
        """``rank 1 (host node7, pid 12), after step 17, in "forward and backward" of samples a, b``"""
        text = f"rank {get_rank()} (host {socket.gethostname()}, pid {os.getpid()}), after step {self.step}, "
        text += f'in "{self.phase}"'
        if self.keys:
            more = len(self.keys) - MOST_KEYS
            text += f" of samples {', '.join(self.keys[:MOST_KEYS])}{f' and {more} more' if more > 0 else ''}"
        return text

    def _watch(self) -> None:
        assert self.timeout_s is not None
        while not self._end.wait(min(self.timeout_s / 10, 1.0)):
            spent = time.monotonic() - self._since
            if spent > self.timeout_s:
                self._give_up(spent)

    def _give_up(self, spent: float) -> None:
        text = f"no progress for {spent:.0f} s (hang_timeout_s = {self.timeout_s:g}): {self.where()}"
        path = self.run_dir / f"hang-rank-{get_rank()}.txt"
        # Not through logging nor a live view, whose locks the stuck thread may hold.
        start = "" if sys.stderr is sys.__stderr__ else "\n"
        print(f"{start}error: {text}; its stacks are in {path}", file=sys.__stderr__, flush=True)
        try:
            with path.open("w") as file:
                file.write(f"{text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(EXIT_HANG)
