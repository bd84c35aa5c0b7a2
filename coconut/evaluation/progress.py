"""Batches that are done, kept on disk until the evaluation is complete: what was killed goes on from there.

OUT/.partial/identity.json     of what checkpoint, data and options the batches are
OUT/.partial/done.jsonl        batches that earlier starts finished, one a line
OUT/.partial/rank-R.jsonl      batches of this start, each rank its own file

A batch holds the same samples whatever the number of ranks, so another number may go on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coconut.evaluation.result import Prediction, write_whole
from coconut.utils.distributed import barrier, get_rank, is_main_process, on_main_first
from coconut.utils.logging import get_logger

logger = get_logger(__name__)

FOLDER = ".partial"
IDENTITY_FILE = "identity.json"
DONE_FILE = "done.jsonl"

#: Predictions of a batch, and the seconds it took.
DoneBatch = tuple[list[Prediction], float]


class Progress:
    """The batches of one evaluation.

    Args:
        out: the evaluation's folder.
        identity: what has to be the same for batches to be used again; plain values.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.folder = out / FOLDER
        self.identity = identity

    def open(self) -> dict[int, DoneBatch]:
        """Batches that are done already, by number; every rank must call it."""
        lines: list[str] = on_main_first(self._take_over)
        barrier()
        self._mine = self.folder / f"rank-{get_rank()}.jsonl"
        return {batch["batch"]: _to_batch(batch) for batch in map(json.loads, lines)}

    def add(self, number: int, predictions: list[Prediction], seconds: float) -> None:
        """Note a batch of this rank."""
        line = json.dumps({"batch": number, "seconds": seconds, "predictions": [asdict(p) for p in predictions]})
        with self._mine.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """Remove the folder; the result is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take_over(self) -> list[str]:
        """Gather what earlier starts left in one file, if it is of this evaluation; else begin with nothing."""
        found: list[str] = []
        if self.folder.is_dir():
            if _read(self.folder / IDENTITY_FILE) == [json.dumps(self.identity, sort_keys=True)]:
                paths = sorted(self.folder.glob("*.jsonl"))
                found = list(dict.fromkeys(line for path in paths for line in _read(path)))
            else:
                logger.warning("%s is of another checkpoint, data or options, and is left aside", self.folder)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_whole(self.folder / IDENTITY_FILE, json.dumps(self.identity, sort_keys=True) + "\n")
        if found:
            write_whole(self.folder / DONE_FILE, "".join(f"{line}\n" for line in found))
            if is_main_process():
                logger.info("%d batches are done already (%s)", len(found), self.folder)
        return found


def _read(path: Path) -> list[str]:
    """Whole lines of a file; a last one without its line break was cut off by a kill. A missing file has none."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []


def _to_batch(line: dict[str, Any]) -> DoneBatch:
    return [Prediction(**values) for values in line["predictions"]], line["seconds"]
