"""`--dry-run`: data, model, engine and plan are made for real, no step is taken, and nothing but a log is written."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest

from launch.train import main
from tests.training import ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def scratch_folders() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("coconut-dry-run-*")}


def first_keys(text: str) -> list[str]:
    """Samples that the log names for the main rank's first micro-batch."""
    found = re.search(r"the first step .*\n.*; samples ([^\n]*?)(?: and \d+ more)?\n", text)
    assert found, text
    return found[1].split(", ")


def test_a_new_run_writes_a_log_and_says_what_it_would_do(home: Path) -> None:
    run = ranks.run(home, "dry", "--dry-run", "max_steps=7")
    assert list(files(run.folder)) == ["log.txt"]
    log = (run.folder / "log.txt").read_text()
    assert "starts at its first step" in log
    assert "2 ranks, ZeRO stage 2 (DeepSpeedZeroOptimizer)" in log  # the engine was built, not described
    assert "train 256 samples, validation 16 samples, test 16 samples" in log
    assert [re.search(r"stage (\d): \d thoughts; at most 1 epochs of 4 steps", line)[1] for line in log.splitlines()
            if "thoughts; at most" in line] == ["0", "1", "2", "3", "4"]  # fmt: skip
    assert "max_steps ends the run after step 7" in log
    assert "loss" not in log  # no step, no validation


def test_it_goes_on_where_the_run_would_and_leaves_the_run_as_it_is(home: Path) -> None:
    ranks.run(home, "kept", "max_steps=6")
    folder = home / "runs" / "kept"
    (folder / "checkpoints" / ".step-00000009.partial").mkdir()  # a run would remove it
    (folder / "checkpoints" / ".step-00000009.partial" / "file").write_text("x")
    (folder / "stop").touch()  # and this
    before = files(folder)
    run = ranks.run(home, "kept", "--dry-run", zero="zero3")
    after = files(folder)
    log = after.pop("log.txt").decode()
    assert log.startswith(before.pop("log.txt").decode())
    assert after == before
    new = log.split("dry run: nothing but this log is written")[1]
    assert "goes on after step 6, in stage 1" in new
    assert "ZeRO stage 3" in new
    assert "the first step (stage 1, step 3 of its epoch)" in new
    assert "stage 0" not in new
    assert "loaded runs/kept/checkpoints/step-00000006" in run.text


def test_the_first_batch_is_the_one_that_a_run_takes(home: Path) -> None:
    dry = ranks.run(home, "batch", "--dry-run", ranks=1)
    real = ranks.run(home, "batch", "max_steps=1", ranks=1, fault="nan@0:0")
    rows = real.rows("anomaly")
    keys = next(iter(rows[0]["ranks"].values()))["keys"]
    named = first_keys(dry.text)
    assert named == keys[: len(named)] and len(named) == 4


def test_json_data_leave_no_shards_behind(home: Path) -> None:
    left = scratch_folders()
    records = [{"id": str(n), "question": "start a4 ?", "steps": ["blue up a3"], "answer": "red"} for n in range(8)]
    (home / "few.json").write_text(json.dumps(records))
    data = ["train_data_path=few.json", "val_data_path=null", "test_data_path=null", "advance_at=null"]
    run = ranks.run(home, "json", "--dry-run", "samples_per_epoch=null", *data)
    assert "train 8 samples" in run.text
    assert not (home / "runs" / ".shards").exists()
    assert scratch_folders() == left


def test_scoring_has_no_dry_run(project: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(project)
    data = ["test_data_path=args", "model_id=args"]  # folders that exist; nothing is read of them
    assert main(["--dry-run", "only_eval=true", *data]) == 2
    assert "--dry-run is for training; only_eval = true" in capsys.readouterr().err


def test_a_later_first_stage_is_the_first_that_is_trained(home: Path) -> None:
    run = ranks.run(home, "later", "--dry-run", "start_stage=2", ranks=1)
    assert "stage 2: 2 thoughts" in run.text and "stage 1: " not in run.text and "stage 0: " not in run.text
    assert "the first step (stage 2, step 1 of its epoch)" in run.text
    real = ranks.run(home, "later", "start_stage=2", "max_steps=1", ranks=1)
    assert [row["stage"] for row in real.rows()] == [2]
