"""Metrics of a run: one JSON line a measurement, to wandb as well when that is on, and a line a person can read."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.utils.distributed import is_main_process
from coconut.utils.logging import get_logger, log_to_wandb

if TYPE_CHECKING:
    from coconut.training.step import StepPlan

logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to RUN/metrics.jsonl from the main process; other ranks write nothing."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_FILE

    def rewind(self, step: int) -> None:
        """Drop the rows of steps after `step`, which a resumed run is about to take again."""
        if not is_main_process() or not self.path.exists():
            return
        text = self.path.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()  # a line cut off by a crash is left out
        rows = [line for line in lines if json.loads(line).get("step", 0) <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in rows))
        partial.replace(self.path)

    def write(self, kind: str, **values: Any) -> None:
        """One row: ``kind`` is plan, train, val, test, stage or anomaly."""
        if not is_main_process():
            return
        row = _without_nan({"kind": kind, **values})
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        log_to_wandb({f"{kind}/{name}": v for name, v in values.items() if isinstance(v, (int, float))}, values["step"])


def _without_nan(value: Any) -> Any:
    """Null in place of numbers that JSON has no word for; a row's ``fault`` says what they were."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Totals:
    """Sums over optimizer steps, on all ranks; divided only when they are read."""

    loss_sum: float = 0.0
    label_tokens: int = 0
    samples: int = 0
    tokens: int = 0
    steps: int = 0
    loader_wait_s: float = 0.0  # of this rank, until its batches were there
    started: float = field(default_factory=time.perf_counter)

    def add(self, loss_sum: float, plan: StepPlan, is_sound: bool) -> None:
        """One step more; the loss of one whose update was dropped is in the row of the anomaly, not in the mean."""
        if is_sound:
            self.loss_sum += loss_sum
            self.label_tokens += plan.label_tokens
        self.samples += plan.samples
        self.tokens += plan.tokens
        self.steps += 1

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def rates(self) -> dict[str, float]:
        """Mean loss a label token, how fast it went, and how long the data were waited for."""
        seconds = max(self.seconds, 1e-9)
        return {
            "loss": self.loss_sum / self.label_tokens if self.label_tokens else math.nan,
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "loader_wait_s": self.loader_wait_s,
            "loader_wait_share": self.loader_wait_s / seconds,
        }


def progress_line(where: str, rates: dict[str, float], seconds_left: float | None) -> str:
    """``stage 1  step 40/157  loss 0.1234  512 samples/s  20.1k tokens/s  waited 2% for data  at most 1:05 left``."""
    line = f"{where}  loss {rates['loss']:.4f}  {rates['samples_per_s']:.0f} samples/s"
    line += f"  {rates['tokens_per_s'] / 1000:.1f}k tokens/s  waited {rates['loader_wait_share']:.0%} for data"
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
        line += f"  at most {clock} left in this stage"
    return line
