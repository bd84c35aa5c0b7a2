"""`deepspeed launch/train.py --deepspeed FILE` as typed: ranks, ZeRO stages, and going on after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.prepare_data import prepare_arrow_maze

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SMALL = [
    "stages.0.epochs=1",
    "epochs_per_stage=1",
    "stages.last.epochs=1",
    "samples_per_epoch=128",
    "log_every_n_steps=1",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    """A folder as a user's clone looks, with a small maze in it."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("args", "ds_configs", "launch"):
        (folder / name).symlink_to(project / name)
    sizes = {"train": 256, "val": 32, "test": 32, "test_paths": 16}
    prepare_arrow_maze(folder / "data" / "arrow_maze", sizes=sizes)
    return folder


def train(home: Path, name: str, *overrides: str, ranks: int = 2, zero: str = "zero3") -> list[dict]:
    """Rows of metrics.jsonl after a run that has to end well."""
    process = start(home, name, *overrides, ranks=ranks, zero=zero)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-6000:]
    return [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def start(home: Path, name: str, *overrides: str, ranks: int = 2, zero: str = "zero3") -> subprocess.Popen[str]:
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        str(ranks),
        "--master_port",
        _free_port(),
    ]
    command += ["launch/train.py", "--deepspeed", f"ds_configs/{zero}.json", f"name={name}", *SMALL, *overrides]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=home, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=os.environ)


def _free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def unbroken(home: Path) -> list[dict]:
    """All five stages, one epoch of four steps each, on two ranks under ZeRO-3."""
    return train(home, "unbroken")


def test_every_stage_runs_in_order(home: Path, unbroken: list[dict]) -> None:
    assert [row["stage"] for row in unbroken if row["kind"] == "stage"] == [0, 1, 2, 3, 4]
    assert [row["n_latents"] for row in unbroken if row["kind"] == "stage"] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in unbroken if row["kind"] == "train"] == list(range(1, 21))
    for folder in ("stage_0", "stage_4", "final"):
        for file in ("config.json", "model.safetensors", "coconut.json", "tokenizer.json", "preprocessor_config.json"):
            assert (home / "runs" / "unbroken" / folder / file).is_file(), (folder, file)
    resolved = json.loads((home / "runs" / "unbroken" / "ds_config.json").read_text())
    assert '"auto"' not in json.dumps(resolved) and resolved["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(("zero", "ranks"), [("zero3", 1), ("zero1", 2), ("zero2", 2), ("zero3_offload", 2)])
def test_stages_and_ranks_agree(home: Path, unbroken: list[dict], zero: str, ranks: int) -> None:
    """The same samples in every step, so the same losses, whoever computes them."""
    rows = train(home, f"{zero}-{ranks}", "max_steps=8", ranks=ranks, zero=zero)
    assert losses(rows) == pytest.approx(losses(unbroken)[:8], rel=2e-3)


def test_a_stopped_run_goes_on_with_the_same_losses(home: Path, unbroken: list[dict]) -> None:
    """Stopped inside stage 1, and again inside stage 2."""
    train(home, "stopped", "max_steps=6")
    train(home, "stopped", "max_steps=11")
    rows = train(home, "stopped")
    assert losses(rows) == losses(unbroken)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 21))


def test_another_configuration_does_not_go_on_and_none_starts_anew(home: Path, unbroken: list[dict]) -> None:
    rows = train(home, "again", "max_steps=3", ranks=1)
    with pytest.raises(AssertionError, match="is of another run: seed was 42 and is 7"):
        train(home, "again", "max_steps=4", "seed=7", ranks=1)
    other = train(home, "again", "max_steps=2", "seed=7", "resume=none", "save_every_n_steps=1", ranks=1)
    folder = home / "runs" / "again"
    assert losses(other) != losses(rows)[:2]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    saved = [line.split("saved ")[1] for line in (folder / "log.txt").read_text().splitlines() if "saved " in line]
    assert saved.count("runs/again/checkpoints/step-00000002") == 1  # due by steps, and the last
    kept = [json.loads(line) for line in (folder / "old-1" / "metrics.jsonl").read_text().splitlines()]
    assert losses(kept) == losses(rows)
    assert (folder / "old-1" / "checkpoints" / "step-00000003" / "state.json").is_file()


def test_other_ranks_and_zero_stages_go_on(home: Path, unbroken: list[dict]) -> None:
    train(home, "moved", "max_steps=6")
    train(home, "moved", "max_steps=11", ranks=1, zero="zero2")
    rows = train(home, "moved")
    assert losses(rows) == pytest.approx(losses(unbroken), abs=1e-4)


def test_a_run_per_stage_and_a_stop_file_give_the_unbroken_run(home: Path, unbroken: list[dict]) -> None:
    folder = home / "runs" / "staged"
    train(home, "staged", "stop_after_stage=0")
    assert json.loads((folder / "stage_0" / "done.json").read_text()) == {"stage": 0, "step": 4, "samples": 128}
    assert not (folder / "final").exists()
    before = (folder / "log.txt").read_text()
    train(home, "staged", "stop_after_stage=0")
    assert (folder / "log.txt").read_text() == before  # said so, and left without loading anything
    process = start(home, "staged", "stop_after_stage=3")
    while not is_past(folder, 8):
        assert process.poll() is None
        time.sleep(0.05)
    (folder / "stop").touch()
    assert process.wait(timeout=200) == 0
    stopped = json.loads((folder / "stopped.json").read_text())
    assert stopped["reason"] == "stop file" and 8 <= stopped["step"] < 16
    rows = train(home, "staged")
    assert losses(rows) == losses(unbroken)
    assert not (folder / "stop").exists() and not (folder / "stopped.json").exists()


def is_past(folder: Path, step: int) -> bool:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    return any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n"))


def test_torchrun_and_plain_python(home: Path, unbroken: list[dict]) -> None:
    for name, command in (
        ("torchrun", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]),
        ("python", [sys.executable]),
    ):
        command += ["launch/train.py", "--deepspeed", "ds_configs/zero3.json", f"name={name}", "max_steps=4", *SMALL]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=500, env=os.environ)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        rows = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert losses(rows) == pytest.approx(losses(unbroken)[:4], rel=2e-3)


def test_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys; from launch.train import build_parser; build_parser().format_help(); "
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
