"""The view at the foot of a terminal, in a real one (a pseudo-terminal of so many lines and columns)."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.training.ranks import SMALL

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_terminal(command: list[str], cwd: Path, stop_at: str = "", columns: int = 160) -> tuple[int, str]:
    """Exit code and all that a terminal would be sent; touches RUN/stop when `stop_at` is seen."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
    process = subprocess.Popen(command, cwd=cwd, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    shown, end = b"", time.monotonic() + 400
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not data:
                break
            shown += data
        if stop_at and stop_at.encode() in shown:
            (cwd / "runs" / "terminal" / "stop").touch()
    os.close(ours)
    return process.wait(timeout=60), shown.decode(errors="replace")


def command(*overrides: str) -> list[str]:
    return [sys.executable, "launch/train.py", "name=terminal", *SMALL, *overrides]


@pytest.fixture(scope="module")
def seen(home: Path) -> tuple[int, str]:
    return in_terminal(command("max_steps=6", "start_stage=1", "save_every_n_steps=3"), home)


@pytest.mark.slow
def test_a_terminal_shows_the_run_and_swallows_no_line(home: Path, seen: tuple[int, str]) -> None:
    code, shown = seen
    assert code == 0
    text = ESCAPE.sub("", shown)
    for part in ("terminal  coconut  stage 1  epoch 1/1  step 4/4", "learning rate", "gradient norm", "samples/s",
                 "answers right", "norm of thoughts", "memory", "left in this stage", "saved runs/"):  # fmt: skip
        assert part in text, part
    log = (home / "runs" / "terminal" / "log.txt").read_text().splitlines()
    printed = set(text.replace("\r", "\n").split("\n"))
    assert len(log) > 10
    # Whole lines, from the view's beginning on.
    assert [line for line in log if line.rstrip() not in {one.rstrip() for one in printed}] == []
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") or shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.slow
def test_a_stop_and_an_error_leave_the_terminal_whole(home: Path, project: Path) -> None:
    code, shown = in_terminal(command("max_steps=80", "stages.0.epochs=20", "resume=none"), home, stop_at="epoch 2/")
    assert code == 0 and "stopped (stop file)" in ESCAPE.sub("", shown)
    # A traceback comes whole, below the view.
    broken = (
        f"import sys; sys.path.insert(0, {str(project)!r}); import coconut.training.trainer as t\n"
        "from launch.train import main\n"
        "def fail(*_): print('half a line', end=''); raise RuntimeError('of this test')\n"
        "t.MultimodalCoTTrainer.validate = fail\nmain(sys.argv[1:])"
    )
    words = ["name=broken", *SMALL]
    code, shown = in_terminal([sys.executable, "-c", broken, *words], home)
    text = ESCAPE.sub("", shown).replace("\r", "")
    assert code == 1 and "Traceback (most recent call last)" in text and "RuntimeError: of this test" in text
    assert text.index("half a line") < text.index("Traceback")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.slow
def test_plain_lines_where_no_terminal_is(home: Path) -> None:
    words = ["name=plain", "max_steps=2", *SMALL]
    done = subprocess.run([sys.executable, "launch/train.py", *words], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "step 2/4" in done.stderr
