"""Checkpoints of a run folder: what is kept, what is passed over, and what a run refuses to go on from."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Timer

import pytest
import torch

from coconut.training.checkpoint import (
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointFolder,
    load_checkpoint,
    read_checkpoint,
)
from coconut.training.metrics import MetricsWriter
from coconut.training.state import TrainState
from coconut.types import CheckpointError, ConfigError

RUN = {"seed": 1, "method": "coconut"}
RANK_FILE = "rank-00000.safetensors"


class Engine:
    """What a DeepSpeed engine without ZeRO shows of itself."""

    def __init__(self, width: int = 3, accumulation: int = 1) -> None:
        self.accumulation = accumulation
        self.module = torch.nn.Linear(width, 2)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.global_steps = self.global_samples = self.skipped_steps = self.micro_steps = 0

    def zero_optimization_partition_weights(self) -> bool:
        return False

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.module(torch.ones(3)).sum().backward()
        self.optimizer.step()
        self.global_steps += 1

    def everything(self) -> list[torch.Tensor]:
        states = self.optimizer.state.values()
        return [*self.module.parameters(), *(state[key] for state in states for key in sorted(state))]


def test_micro_steps_are_those_of_the_engine_that_goes_on(checkpoints: CheckpointFolder, engine: Engine) -> None:
    """DeepSpeed steps where its accumulation divides them: another accumulation must not begin out of turn."""
    engine.step()
    engine.step()
    engine.micro_steps = 3
    folder = checkpoints.save(engine, TrainState(step=3))
    other = Engine(accumulation=2)
    load_checkpoint(other, read_checkpoint(folder, RUN))
    assert (other.global_steps, other.micro_steps) == (3, 6)


@pytest.fixture
def engine() -> Engine:
    engine = Engine()
    engine.step()
    return engine


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep=2, run=RUN)


def names(checkpoints: CheckpointFolder) -> list[str]:
    return [path.name for path in checkpoints.complete()]


def test_the_newest_are_kept_and_the_one_just_written_and_the_best(
    checkpoints: CheckpointFolder, engine: Engine
) -> None:
    for step, accuracy in ((1, None), (2, 0.9), (3, 0.5), (4, 0.7), (5, None)):
        checkpoints.save(engine, TrainState(step=step), accuracy)
    assert names(checkpoints) == ["step-00000002", "step-00000004", "step-00000005"]
    checkpoints.save(engine, TrainState(step=6, stage=1), 0.1)  # the best of the stage before has no claim any more
    assert names(checkpoints) == ["step-00000005", "step-00000006"]
    checkpoints.save(engine, TrainState(step=1))  # of a run that went back
    assert "step-00000001" in names(checkpoints)


def test_state_and_tensors_come_back_whole(checkpoints: CheckpointFolder, engine: Engine) -> None:
    state = TrainState(stage=2, epoch=7, epoch_step=3, step=99, flops=1.5e12, samples_per_step=32, stage_done=True)
    folder = checkpoints.save(engine, state)
    found = read_checkpoint(folder, RUN)
    assert found.state == state
    other = Engine()
    load_checkpoint(other, found)
    assert other.global_steps == 1
    for left, right in zip(engine.everything(), other.everything(), strict=True):
        assert torch.equal(left, right)
    for one in (engine, other):
        one.step()
    assert torch.equal(engine.module.weight, other.module.weight)


def test_a_checkpoint_of_another_model_is_refused(checkpoints: CheckpointFolder, engine: Engine) -> None:
    found = read_checkpoint(checkpoints.save(engine, TrainState(step=5)), RUN)
    with pytest.raises(CheckpointError, match="weight of weight with 2 of 8 values missing"):
        load_checkpoint(Engine(width=4), found)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x10
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.fixture
def slow_disk(checkpoints: CheckpointFolder) -> Iterator[Event]:
    """The thread that writes waits for this."""
    go = Event()
    checkpoints._writer.submit(go.wait, 60)
    yield go
    go.set()


def test_what_is_written_is_what_was_there_at_the_step_boundary(
    checkpoints: CheckpointFolder, engine: Engine, slow_disk: Event
) -> None:
    expected, state = [tensor.detach().clone() for tensor in engine.everything()], TrainState(step=1)
    state.recent_losses.append(2.0)
    checkpoints.begin(engine, state)
    assert not checkpoints.is_written
    engine.step()
    state.step = 2
    state.recent_losses.append(1.0)
    assert names(checkpoints) == []  # no reader takes it for whole yet
    slow_disk.set()
    folder = checkpoints.finish()
    assert folder is not None and names(checkpoints) == [folder.name]
    found, other = read_checkpoint(folder, RUN), Engine()
    load_checkpoint(other, found)
    assert (found.state.step, found.state.recent_losses, other.global_steps) == (1, [2.0], 1)
    for left, right in zip(expected, other.everything(), strict=True):
        assert torch.equal(left, right)


def test_the_next_save_waits_for_the_one_that_is_being_written(
    checkpoints: CheckpointFolder, engine: Engine, slow_disk: Event
) -> None:
    checkpoints.begin(engine, TrainState(step=1))
    Timer(0.2, slow_disk.set).start()
    checkpoints.save(engine, TrainState(step=2))
    assert names(checkpoints) == ["step-00000001", "step-00000002"]
    assert checkpoints.newest_valid() == checkpoints.folder / "step-00000002"
    checkpoints.begin(engine, TrainState(step=3))
    assert checkpoints.newest_valid() == checkpoints.folder / "step-00000003"  # a rollback goes back to it


def test_a_write_that_fails_in_the_background_is_said_and_leaves_the_older_ones(
    checkpoints: CheckpointFolder, engine: Engine, slow_disk: Event, said_warnings: list[str]
) -> None:
    slow_disk.set()
    checkpoints.save(engine, TrainState(step=1))
    go = Event()
    checkpoints._writer.submit(go.wait, 60)
    checkpoints.begin(engine, TrainState(step=2))
    (checkpoints.folder / ".step-00000002.partial").rmdir()
    go.set()
    checkpoints.settle()
    assert "training goes on without a checkpoint" in said_warnings[-1] and "step-00000002" in said_warnings[-1]
    assert names(checkpoints) == ["step-00000001"]
    assert checkpoints.saved is not None and checkpoints.saved["step"] == 1
    checkpoints.save(engine, TrainState(step=3))
    assert names(checkpoints) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (RANK_FILE, flip_a_bit, "has another SHA-256 than when it was written"),
        (STATE_FILE, flip_a_bit, "has another SHA-256"),
        (RANK_FILE, truncate, r"has \d+ bytes, \d+ were written"),
        (RANK_FILE, Path.unlink, "rank-00000.safetensors is missing"),
        (MANIFEST_FILE, truncate, "manifest.json is damaged"),
        (MANIFEST_FILE, Path.unlink, "manifest.json is missing"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(
    checkpoints: CheckpointFolder, engine: Engine, said_warnings: list[str], file: str, damage, said: str
) -> None:
    assert checkpoints.newest_valid() is None
    older, newer = (checkpoints.save(engine, TrainState(step=step)) for step in (1, 2))
    assert checkpoints.newest_valid() == newer
    (checkpoints.folder / ".step-00000003.partial").mkdir()  # its writer died
    damage(newer / file)
    assert checkpoints.newest_valid() == older
    text = "\n".join(said_warnings)
    assert f"passing over {newer}" in text and "its writer died" in text
    assert re.search(said, text)
    damage(older / file)
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoint\(s\)"):
        checkpoints.newest_valid()


@pytest.fixture
def said_warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr("coconut.training.checkpoint.logger.warning", lambda text, *values: said.append(text % values))
    return said


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


def test_a_hostile_pickle_does_not_run(checkpoints: CheckpointFolder, engine: Engine, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists()  # so the file is dangerous
    trace.unlink()
    folder = checkpoints.save(engine, TrainState(step=5))
    found = read_checkpoint(folder, RUN)
    for name in (RANK_FILE, "mp_rank_00_model_states.pt", "rank-00001.safetensors"):
        torch.save(Hostile(trace), folder / name)
    with pytest.raises(CheckpointError, match="is no checkpoint file"):
        load_checkpoint(engine, found)
    assert not trace.exists()


def test_a_write_that_fails_leaves_the_older_ones(
    checkpoints: CheckpointFolder, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = checkpoints.save(engine, TrainState(step=1))

    def no_space(*_: object, **__: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coconut.training.pieces.save_file", no_space)
    with pytest.raises(CheckpointError, match=r"rank 0: .*No space left on device.*untouched"):
        checkpoints.save(engine, TrainState(step=2))
    assert checkpoints.newest_valid() == older
    assert [path.name for path in checkpoints.folder.iterdir()] == [older.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_an_error_before_and_while_writing(
    small_disk: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = CheckpointFolder(small_disk / "checkpoints", keep=2, run=RUN)
    older = checkpoints.save(engine, TrainState(step=1))
    engine.module.register_buffer("large", torch.zeros(700, 1024))  # 2.7 MiB
    with pytest.raises(CheckpointError, match=r"needs 3\.7 MiB and (2\.9|3\.0) MiB are free"):
        checkpoints.save(engine, TrainState(step=2))
    (small_disk / "others").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(checkpoints, "_need_space", lambda *_: None)  # the disk filled up after the look
    with pytest.raises(CheckpointError, match=r"No space left on device|could not be written"):
        checkpoints.save(engine, TrainState(step=2))
    assert checkpoints.newest_valid() == older


def test_another_run_is_refused(checkpoints: CheckpointFolder, engine: Engine) -> None:
    folder = checkpoints.save(engine, TrainState(step=5))
    with pytest.raises(ConfigError, match="seed was 1 and is 2; method was 'coconut' and is 'cot'"):
        read_checkpoint(folder, {"seed": 2, "method": "cot"})
    (folder / STATE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        read_checkpoint(folder, RUN)
    (folder / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_checkpoint(folder, RUN)


def test_a_folder_with_a_name_of_its_own_is_no_newest_checkpoint(checkpoints: CheckpointFolder, engine: Engine) -> None:
    newest = checkpoints.save(engine, TrainState(step=5))
    shutil.copytree(newest, newest.with_name("step-best"))
    assert checkpoints.newest_valid() == newest and checkpoints.complete() == [newest]


def test_a_broken_line_of_metrics_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write("train", step=step, loss=0.5)
    first, second, third = writer.path.read_text().splitlines()
    writer.path.write_text(f"{first}\n{second[:9]}\n{third}\n")
    writer.rewind(3)
    assert writer.path.read_text() == f"{first}\n{third}\n"
    assert "line 2 cannot be read" in caplog.text


def test_metrics_wait_for_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path)
    writer.path.symlink_to("/dev/full")
    writer.write("train", step=1)
    writer.write("train", step=2)
    assert caplog.text.count("metrics wait for room on the disk") == 1
    writer.path.unlink()
    writer.write("train", step=3)
    assert [json.loads(line)["step"] for line in writer.path.read_text().splitlines()] == [1, 2, 3]


def test_metrics_are_taken_back_to_the_checkpoint(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write("train", step=step, loss=0.5)
    with writer.path.open("a") as file:
        file.write('{"kind": "train", "st')  # the process died here
    writer.rewind(2)
    assert [json.loads(line)["step"] for line in writer.path.read_text().splitlines()] == [1, 2]
