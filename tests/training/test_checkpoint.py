"""Checkpoints of a run folder: what is kept, what is moved aside, and what a run refuses to go on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coconut.training.checkpoint import (
    STATE_FILE,
    CheckpointFolder,
    load_checkpoint,
    read_checkpoint,
)
from coconut.training.metrics import MetricsWriter
from coconut.training.state import TrainState
from coconut.types import CheckpointError, ConfigError

RUN = {"seed": 1, "method": "coconut"}


class Engine:
    """Writes a file where DeepSpeed writes many."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert save_latest is False
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "weights.pt").write_text("weights")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict]:
        if (Path(folder) / tag / "weights.pt").read_text() != "weights":
            raise RuntimeError("invalid header")
        return folder, {}


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep=2, run=RUN)


def names(checkpoints: CheckpointFolder) -> list[str]:
    return [path.name for path in checkpoints.complete()]


def test_the_newest_are_kept_and_the_one_just_written_always(checkpoints: CheckpointFolder) -> None:
    for step in (1, 2, 3):
        checkpoints.save(Engine(), TrainState(step=step))
    assert names(checkpoints) == ["step-00000002", "step-00000003"]
    checkpoints.save(Engine(), TrainState(step=1))  # of a run that went back
    assert "step-00000001" in names(checkpoints)


def test_state_comes_back_whole(checkpoints: CheckpointFolder) -> None:
    state = TrainState(stage=2, epoch=7, epoch_step=3, step=99, flops=1.5e12, samples_per_step=32, stage_done=True)
    folder = checkpoints.save(Engine(), state)
    assert read_checkpoint(folder, RUN) == state
    load_checkpoint(Engine(), folder)


def test_an_unfinished_folder_is_no_checkpoint(checkpoints: CheckpointFolder) -> None:
    folder = checkpoints.save(Engine(), TrainState(step=5))
    (folder / STATE_FILE).unlink()
    assert checkpoints.newest() is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_checkpoint(folder, RUN)


def test_damage_is_named(checkpoints: CheckpointFolder) -> None:
    folder = checkpoints.save(Engine(), TrainState(step=5))
    (folder / "engine" / "weights.pt").write_text("wei")
    with pytest.raises(CheckpointError, match=r"step-00000005 cannot be loaded .*invalid header"):
        load_checkpoint(Engine(), folder)
    (folder / STATE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        read_checkpoint(folder, RUN)


def test_another_run_or_number_of_ranks_is_refused(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.save(Engine(), TrainState(step=5))
    with pytest.raises(ConfigError, match="seed was 1 and is 2; method was 'coconut' and is 'cot'"):
        read_checkpoint(folder, {"seed": 2, "method": "cot"})
    monkeypatch.setattr("coconut.training.checkpoint.get_world_size", lambda: 4)
    with pytest.raises(CheckpointError, match=r"written by 1 rank\(s\), this run has 4"):
        read_checkpoint(folder, RUN)


def test_metrics_are_taken_back_to_the_checkpoint(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write("train", step=step, loss=0.5)
    with writer.path.open("a") as file:
        file.write('{"kind": "train", "st')  # the process died here
    writer.rewind(2)
    assert [json.loads(line)["step"] for line in writer.path.read_text().splitlines()] == [1, 2]
