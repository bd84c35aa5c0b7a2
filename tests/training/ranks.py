"""Runs of `launch/train.py` on several ranks, quick to start, with faults built in where a test asks for them.

The ranks are forked from a server that has imported everything once: a start costs a second or two in place of fifteen.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: A stage of four steps an epoch on the arrow maze.
SMALL = (
    "stages.0.epochs=1",
    "epochs_per_stage=1",
    "stages.last.epochs=1",
    "samples_per_epoch=128",
    "log_every_n_steps=1",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.training.ranks_preload"])


@dataclass
class Run:
    """Ranks that were started, and where they write."""

    processes: list[Any]
    folder: Path  # RUN
    output: Path
    started: float
    ended: float = 0.0

    def finish(self, timeout_s: float = 300) -> list[int]:
        """Exit codes (negative: the signal) once all have ended; ends the others after a failure."""
        end = time.monotonic() + timeout_s
        failed_at = None
        while any(process.is_alive() for process in self.processes):
            now = time.monotonic()
            if failed_at is None and any(process.exitcode not in (None, 0) for process in self.processes):
                failed_at = now
            if now > end or (failed_at is not None and now > failed_at + 5):
                self.kill()
            time.sleep(0.05)
        self.ended = time.monotonic()
        return [process.exitcode for process in self.processes]

    def kill(self, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if process.is_alive() and (ranks is None or rank in ranks):
                os.kill(process.pid, signal.SIGKILL)

    def rows(self, kind: str = "train") -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def seconds_since_fault(self) -> float:
        """From the last fault to the end of the last rank; `finish` was called."""
        last = [line for line in self.text.splitlines() if line.startswith("FAULT ")][-1]
        return self.ended - float(last.split()[2])

    @property
    def text(self) -> str:
        return self.output.read_text()


def start(home: Path, name: str, *overrides: str, ranks: int = 2, zero: str = "zero2", fault: str = "") -> Run:
    """Start `ranks` ranks of the run `name` in `home`, without ZeRO where `zero` is empty; see `faults` for `fault`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    output = home / f"{name}.output.txt"
    engine = ["--deepspeed", f"ds_configs/{zero}.json"] if zero else []
    arguments = [*engine, f"name={name}", *SMALL, *overrides]
    began = time.monotonic()
    processes = [
        _context.Process(target=_rank, args=(str(home), str(output), arguments, rank, ranks, port, fault))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Run(processes, home / "runs" / name, output, began)


def run(home: Path, name: str, *overrides: str, **options: Any) -> Run:
    """A run that has to end well."""
    started = start(home, name, *overrides, **options)
    codes = started.finish()
    assert set(codes) == {0}, (codes, started.text[-6000:])
    return started


def _rank(home: str, output: str, arguments: list[str], rank: int, ranks: int, port: str, fault: str) -> None:
    os.chdir(home)
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdin.close()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )  # fmt: skip
    from launch.train import main
    from tests.training.faults import build_in

    build_in(fault, rank)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a launcher's ranks end their interpreter; here there is a server's copy of it
