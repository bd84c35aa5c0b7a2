"""Metrics of a run: a JSON line a measurement, to wandb and DeepSpeed's monitors where asked for, a line to read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.training.monitors import open_monitors
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
        self._monitors: Any = None
        self._unwritten: list[str] = []

    def open_monitors(self, ds_config: dict[str, Any], step: int) -> None:
        """Send later rows to DeepSpeed's monitors too; see `monitors.open_monitors`."""
        self._monitors = open_monitors(ds_config, step)

    def rewind(self, step: int) -> None:
        """Drop the rows of steps after `step`, which a resumed run is about to take again."""
        if not is_main_process() or not self.path.exists():
            return
        text = self.path.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()  # a line cut off by a crash is left out
        steps = [_step_of(line) for line in lines]
        if broken := [number for number, of in enumerate(steps, 1) if of is None]:
            logger.warning("%s: line %s cannot be read and is left out", self.path, ", ".join(map(str, broken)))
        rows = [line for line, of in zip(lines, steps, strict=True) if of is not None and of <= step]
        partial = self.path.with_suffix(".partial")
        with partial.open("w") as file:
            file.write("".join(f"{line}\n" for line in rows))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def write(self, kind: str, **values: Any) -> None:
        """One row: ``kind`` is plan, train, val, test, stage or anomaly."""
        if not is_main_process():
            return
        self._unwritten.append(json.dumps(_without_nan({"kind": kind, **values})) + "\n")
        self._append()
        numbers = {f"{kind}/{name}": v for name, v in values.items() if isinstance(v, (int, float)) and name != "step"}
        log_to_wandb(numbers, values["step"])
        if self._monitors is not None:
            self._monitors.write_events([(name, value, values["step"]) for name, value in numbers.items()])

    def _append(self) -> None:
        """Write the rows that are not on the disk yet; a full one ends no training, and gets them later."""
        try:
            with self.path.open("ab") as file:
                before = file.tell()
                try:
                    file.write("".join(self._unwritten).encode())
                    file.flush()
                except OSError:
                    file.truncate(before)  # no half a line
                    raise
        except OSError as error:
            if len(self._unwritten) == 1:
                logger.warning("metrics wait for room on the disk: %s", error)
            return
        self._unwritten.clear()


def _step_of(line: str) -> int | None:
    """The step of a row; None where the line is none."""
    try:
        return int(json.loads(line).get("step", 0))
    except (ValueError, TypeError, AttributeError):
        return None


def _without_nan(value: Any) -> Any:
    """Null in place of numbers that JSON has no word for; a row's ``fault`` says what they were."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Totals:
    """Sums over optimizer steps, on all ranks where nothing else is said; divided only when they are read."""

    loss_sum: float = 0.0  # of this rank
    label_tokens: int = 0
    samples: int = 0
    tokens: int = 0
    patches: int = 0
    cells: int = 0  # of batches, padding included
    costliest: float = 0.0  # cost of the costliest rank of each micro-step
    mean_cost: float = 0.0
    flops: float = 0.0  # forward and backward, without what gradient checkpointing computes again
    steps: int = 0
    loader_wait_s: float = 0.0  # of this rank, until its batches were there
    seconds: float = 0.0  # of training steps, validation and saving not counted

    def add(self, loss_sum: float, plan: StepPlan, flops: float, is_sound: bool) -> None:
        """One step more; the loss of one whose update was dropped is in the row of the anomaly, not in the mean."""
        if is_sound:
            self.loss_sum += loss_sum
            self.label_tokens += plan.label_tokens
        self.samples += plan.samples
        self.tokens += plan.tokens
        self.patches += plan.patches
        self.cells += plan.cells
        self.costliest += plan.costliest
        self.mean_cost += plan.mean_cost
        self.flops += flops
        self.steps += 1

    def rates(self, peak_flops: float | None, norms: Sequence[float]) -> dict[str, float]:
        """What a row of training metrics says (docs/cockpit.md has each formula).

        Args:
            peak_flops: operations a second that all ranks' devices together can do at most; None leaves out ``mfu``.
            norms: as `NormMeter.take` gives them, over all ranks; norms of nothing are left out.
        """
        seconds = max(self.seconds, 1e-9)
        rates = {
            "loss": self.loss_sum / self.label_tokens if self.label_tokens else math.nan,
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "patches_per_s": self.patches / seconds,
            "step_s": self.seconds / max(self.steps, 1),
            "loader_wait_s": self.loader_wait_s,
            "loader_wait_share": self.loader_wait_s / seconds,
            "imbalance": self.costliest / self.mean_cost if self.mean_cost else 1.0,
            "padding": 1 - self.tokens / self.cells if self.cells else 0.0,
        }
        if peak_flops is not None:
            rates["mfu"] = self.flops / (seconds * peak_flops)
        for name, norm_sum, count in zip(("thought_norm", "embedding_norm"), norms[::2], norms[1::2], strict=True):
            if count and norms[1]:  # a method without thoughts has nothing to compare
                rates[name] = norm_sum / count
        return rates


def progress_line(where: str, rates: dict[str, float], seconds_left: float | None) -> str:
    """``stage 1  step 40/157  loss 0.1234  512 samples/s  20.1k tokens/s  waited 2% for data  at most 1:05 left``."""
    line = f"{where}  loss {rates['loss']:.4f}  {rates['samples_per_s']:.0f} samples/s"
    line += f"  {rates['tokens_per_s'] / 1000:.1f}k tokens/s  waited {rates['loader_wait_share']:.0%} for data"
    if "mfu" in rates:
        line += f"  MFU {rates['mfu']:.1%}"
    if seconds_left is not None:
        line += f"  at most {clock(seconds_left)} left in this stage"
    return line


def clock(seconds: float) -> str:
    """``1:05``, or ``2:01:05`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
