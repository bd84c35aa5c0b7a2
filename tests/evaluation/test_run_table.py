"""The table of stages: sums by time, whatever a run has come to, and runs beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coconut.evaluation.collect import read_run
from coconut.evaluation.run_table import stages_tables
from launch import report as script


def write(folder: Path, rows: list[dict[str, Any]], end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    (folder / "config.yaml").write_text("method: coconut\n")
    return folder


def train(stage: int, step: int, seconds: float, **values: Any) -> dict[str, Any]:
    position = {"kind": "train", "stage": stage, "step": step, "seconds": seconds}
    return {**position, "samples": 10 * step, "tokens": 300 * step, **values}


def cells(tables: list[dict[str, Any]], row: str) -> dict[str, str]:
    found = {}
    for table in tables:
        (one,) = (one for one in table["rows"] if one["name"] == row)
        found |= dict(zip(table["head"][1:], [cell.replace("\u202f", " ") for cell in one["cells"]], strict=True))
    return found


def test_rates_are_those_of_whole_stages_and_shares_weighted_by_time(tmp_path: Path) -> None:
    rows = [
        train(0, 10, 10.0, mfu=0.5, padding=0.1, memory_bytes=3e9, loader_wait_share=0.0, imbalance=1.0),
        train(0, 20, 40.0, mfu=0.1, padding=0.1, memory_bytes=2e9, loader_wait_share=0.4, imbalance=1.4),
        {"kind": "anomaly", "stage": 0, "step": 20, "fault": "loss is nan"},
        {"kind": "anomaly", "stage": 0, "step": 20, "fault": "rollback"},
        {"kind": "val", "stage": 0, "step": 20, "accuracy": 0.75, "loss": 0.5},
        train(1, 30, 60.0, mfu=0.2, padding=0.2, memory_bytes=1e9, thought_norm=12.0, embedding_norm=1.5),
    ]
    tables = stages_tables([read_run(write(tmp_path / "a", rows, end='{"kind": "train", "sta'))])
    first, second = cells(tables, "Coconut, stage 0"), cells(tables, "Coconut, stage 1")
    assert first | {"Steps": "20", "Time": "40 s", "Answers right": "75.0 %", "Validation loss": "0.500"} == first
    assert first | {"Skipped": "1", "Samples/s": "5.0", "Tokens/s": "150", "MFU": "20.0 %"} == first
    assert (
        first | {"Waited for data": "30.0 %", "Imbalance": "1.300", "Memory": "3.00 GB", "Padding": "10.0 %"} == first
    )
    assert second | {"Steps": "10", "Samples/s": "5.0", "Norm of thoughts": "12", "of embeddings": "1.5"} == second
    assert second["Answers right"] == "–" and "Patches/s" not in second


def test_runs_of_one_method_keep_their_folders_and_old_ones_their_place(tmp_path: Path) -> None:
    a = write(tmp_path / "x" / "a", [train(0, 10, 5.0, mfu=0.5)])
    b = write(tmp_path / "x" / "b", [{"kind": "train", "stage": 0, "step": 10, "loss": 1.0}])  # of an older version
    tables = stages_tables([read_run(a), read_run(b)])
    assert [row["name"] for row in tables[0]["rows"]] == ["Coconut (x/a), stage 0", "Coconut (x/b), stage 0"]
    assert cells(tables, "Coconut (x/b), stage 0")["MFU"] == "–"
    assert stages_tables([read_run(write(tmp_path / "empty", []))]) == []


def test_the_report_compares_a_finished_run_and_one_that_has_hardly_begun(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    done, begun = write_run(tmp_path / "done"), write(tmp_path / "begun", [train(0, 10, 5.0, mfu=0.25)], end='{"ki')
    assert script.main([str(done), str(begun), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "Stage by stage" in page and "begun), stage 0" in page and "25.0\u202f%" in page
    assert "Norm of thoughts" not in page
