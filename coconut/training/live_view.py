"""A run as it is now, at the foot of a terminal: where it stands, how it goes, what happened last.

    RunLog --rows, steps--> LiveView --rich--> the terminal's last lines
    log lines, print ------------------------> above them, as they would be without

Drawn by the training process itself, at its steps: a thread that draws could hold a lock while loader processes are
forked, which would then wait for it for ever.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections import deque
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coconut.training.metrics import clock
from coconut.utils.distributed import is_main_process
from coconut.utils.logging import ROOT

LEAST_INTERVAL_S = 0.25  # between two drawings of the steps
EVENTS = 4  # that stay on view


class LiveView:
    """Shows a run while it is entered; does nothing before and after, on other ranks, and where nobody looks.

    Args:
        mode: auto (where standard output is a terminal), always, never.
        title: of the run.
    """

    def __init__(self, mode: str = "never", title: str = "") -> None:
        self.mode, self.title = mode, title
        self.where, self.done, self.total = "", 0, 0  # of the stage, in optimizer steps; a total of 0 is not known
        self.rows: dict[str, dict[str, Any]] = {}  # the last of each kind
        self.events: deque[Text] = deque(maxlen=EVENTS)
        self._live: Live | None = None
        self._replaced: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._listener = _Listener(self.events)
        self._streams: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)
        self._drawn = 0.0

    def __enter__(self) -> LiveView:
        is_wanted = self.mode == "always" or (self.mode == "auto" and sys.stdout.isatty())
        if not is_wanted or not is_main_process():
            return self
        # A file of its own: by default a console looks up sys.stdout each time, which leads back to it below.
        console = Console(file=sys.stdout, force_terminal=True if self.mode == "always" else None)
        if console.is_dumb_terminal:  # it could not go back to the view's first line
            return self
        self._streams = sys.stdout, sys.stderr
        self._live = Live(
            console=console,
            get_renderable=self._render,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        console.show_cursor(True)  # a process that is killed could not bring it back
        self._redirect(console)
        logging.getLogger(ROOT).addHandler(self._listener)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is None:
            return
        logging.getLogger(ROOT).removeHandler(self._listener)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Above):
                stream.end()
        sys.stdout, sys.stderr = self._streams
        for handler, stream in self._replaced:
            handler.setStream(stream)
        self._replaced.clear()
        self._live.refresh()
        self._live.stop()
        self._live = None

    def step(self, where: str, done: int, total: int | None) -> None:
        """A step of a stage is done: `done` of `total`."""
        self.where, self.done, self.total = where, done, total or 0
        if self._live is not None and time.monotonic() - self._drawn > LEAST_INTERVAL_S:
            self._live.refresh()
            self._drawn = time.monotonic()

    def row(self, kind: str, values: dict[str, Any]) -> None:
        """A row of metrics was written; those of a stage that ended say nothing of the next."""
        self.rows = {} if kind == "stage" else self.rows | {kind: values}
        if self._live is not None:
            self._live.refresh()

    # -- what is printed meanwhile --

    def _redirect(self, console: Console) -> None:
        """Lead what goes to this terminal through the console; what goes to a file goes on to."""
        ours = [stream for stream in self._streams if self.mode == "always" or stream.isatty()]
        above = {id(stream): _Above(console, stream) for stream in ours}
        sys.stdout = above.get(id(sys.stdout), sys.stdout)
        sys.stderr = above.get(id(sys.stderr), sys.stderr)
        # Handlers keep the stream that they were made with: those of DeepSpeed and others too.
        loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
        for handler in {handler for logger in loggers for handler in logger.handlers}:
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in above:
                self._replaced.append((handler, handler.stream))
                handler.setStream(above[id(handler.stream)])

    # -- how it looks --

    def _render(self) -> Group:
        head = Text(f"{self.title}  {self.where}", style="bold", no_wrap=True, overflow="ellipsis")
        parts: list[Any] = [Text(""), head]
        train = self.rows.get("train", {})
        if self.total:
            left = (self.total - self.done) * train["step_s"] if "step_s" in train else None
            text = f"{self.done / self.total:.0%}" + (
                "" if left is None else f"  at most {clock(left)} left in this stage"
            )
            bar = Table.grid(padding=(0, 2, 0, 0))
            bar.add_row(ProgressBar(total=self.total, completed=self.done, width=40), text)
            parts.append(bar)
        cells = [f"{name} {text}" for name, text in _measured(train, self.rows.get("val", {}))]
        table = Table.grid(padding=(0, 4, 0, 0))
        for first in range(0, len(cells), 3):
            table.add_row(*cells[first : first + 3])
        return Group(*parts, table, *self.events)


def _measured(train: dict[str, Any], val: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what the last rows say, as far as they say it."""
    forms = (
        ("loss", train, "loss", "{:.4f}"),
        ("answers right", val, "accuracy", "{:.1%}"),
        ("whole text right", val, "full_match", "{:.1%}"),
        ("learning rate", train, "lr", "{:.2e}"),
        ("gradient norm", train, "grad_norm", "{:.3g}"),
        ("validation loss", val, "loss", "{:.4f}"),
        ("samples/s", train, "samples_per_s", "{:,.1f}"),
        ("tokens/s", train, "tokens_per_s", "{:,.0f}"),
        ("patches/s", train, "patches_per_s", "{:,.1f}"),
        ("waited for data", train, "loader_wait_share", "{:.1%}"),
        ("imbalance", train, "imbalance", "{:.3f}"),
        ("padding", train, "padding", "{:.1%}"),
        ("norm of thoughts", train, "thought_norm", "{:.3g}"),
        ("of embeddings", train, "embedding_norm", "{:.3g}"),
        ("MFU", train, "mfu", "{:.1%}"),
    )
    found = [(name, form.format(row[key])) for name, row, key, form in forms if row.get(key) is not None]
    if "memory_bytes" in train:
        found.append(("memory", f"{train['memory_bytes'] / 1e9:.2f} GB"))
    return found


class _Above(io.TextIOBase):
    """Prints whole lines above the view. In a process forked from this one, which has no view, prints as before."""

    def __init__(self, console: Console, under: TextIO) -> None:
        self.console, self.under = console, under
        self._pid, self._rest = os.getpid(), ""

    def write(self, text: str) -> int:
        if os.getpid() != self._pid:
            return self.under.write(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self.console.print(Text.from_ansi(line), soft_wrap=True)
        return len(text)

    def end(self) -> None:
        """Print what came without a line break."""
        if self._rest:
            self.write("\n")

    def flush(self) -> None:
        self.under.flush()

    def isatty(self) -> bool:
        return self.under.isatty()

    def fileno(self) -> int:
        return self.under.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.under.encoding


class _Listener(logging.Handler):
    """Keeps what happens seldom: warnings, saves, ends of stages. The lines of metrics are on view already."""

    def __init__(self, events: deque[Text]) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        is_event = record.name.startswith(f"{ROOT}.training.") and not record.name.endswith(".run_log")
        if is_warning or is_event:
            text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}  {record.getMessage()}".splitlines()[0]
            style = "yellow" if is_warning else "dim"
            self._events.append(Text(text, style=style, no_wrap=True, overflow="ellipsis"))
