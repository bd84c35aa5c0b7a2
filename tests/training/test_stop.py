"""Requests to stop a run: noted by handlers, seen as a file, agreed over ranks."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from coconut.training.resume import last_stage
from coconut.training.stop import STOP_FILE, STOPPED_FILE, StopRequests, noting_signals
from tests.training.ranks import run, start


def test_a_file_or_a_signal_asks_for_a_stop_and_the_next_start_forgets_it(tmp_path: Path) -> None:
    stops = StopRequests(tmp_path)
    assert stops.reason(stops.flags()) is None
    (tmp_path / STOP_FILE).touch()
    assert stops.reason(stops.flags()) == "stop file"
    handler = signal.getsignal(signal.SIGTERM)
    with noting_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stops.reason(stops.flags()) == "stop file, SIGTERM, SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is handler
    stops.write(2, 17, "SIGTERM")
    assert json.loads((tmp_path / STOPPED_FILE).read_text()) == {"stage": 2, "step": 17, "reason": "SIGTERM"}
    stops.clear()
    assert stops.reason(stops.flags()) is None
    assert list(tmp_path.iterdir()) == []


def test_one_rank_is_enough(tmp_path: Path) -> None:
    assert StopRequests(tmp_path).reason([0.0, 1.0, 0.0]) == "SIGTERM"  # the sums over ranks


def test_the_stage_to_end_with_has_to_be_one_of_the_run(tmp_path: Path) -> None:
    assert last_stage(None, [0, 1, 2]) == 2 and last_stage(1, [0, 1, 2]) == 1
    with pytest.raises(ValueError, match="stop_after_stage = 3: this run has the stages 0 to 2"):
        last_stage(3, [0, 1, 2])


def metrics(folder: Path) -> str:
    path = folder / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(home: Path, number: signal.Signals) -> None:
    name = f"signal-{number.name}"
    run_ = start(home, name, "max_steps=20", "stages.0.epochs=5")
    while '"kind": "train"' not in metrics(run_.folder) and run_.processes[1].is_alive():
        time.sleep(0.02)
    os.kill(run_.processes[1].pid, number)
    assert run_.finish() == [0, 0]
    stopped = json.loads((run_.folder / STOPPED_FILE).read_text())
    assert stopped["reason"] == number.name and 1 <= stopped["step"] < 20
    assert (run_.folder / "checkpoints" / f"step-{stopped['step']:08d}" / "manifest.json").is_file()
    again = run(home, name, "max_steps=20", "stages.0.epochs=5")
    assert [row["step"] for row in again.rows()] == list(range(1, 21))
    assert not (again.folder / STOPPED_FILE).exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_save_due_at_an_epochs_end_is_made_and_a_stop_does_not_make_it_twice(home: Path) -> None:
    """An epoch has four steps; epochs save of themselves only every fifth time."""
    run_ = start(home, "due", "max_steps=200", "stages.0.epochs=50", "save_every_n_steps=1", "max_checkpoints=100")
    fifth = run_.folder / "checkpoints" / "step-00000005"
    while not fifth.is_dir() and run_.processes[0].is_alive():
        time.sleep(0.005)
    os.kill(run_.processes[0].pid, signal.SIGTERM)
    assert run_.finish() == [0, 0]
    last = json.loads((run_.folder / STOPPED_FILE).read_text())["step"]
    names = sorted(path.name for path in (run_.folder / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:08d}" for step in range(1, last + 1)]
    assert run_.text.count(f"saved runs/due/checkpoints/step-{last:08d}") == 1
