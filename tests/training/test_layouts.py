"""A run that goes on with other ranks, under another ZeRO stage, or on a disk that is full."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coconut.training.checkpoint import SPARE_BYTES
from launch.prepare_models import ensure_model
from tests.training.ranks import Run, run, start

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def losses(run_: Run) -> list[float]:
    return [row["loss"] for row in run_.rows()]


def test_two_ranks_one_and_two_again_under_zero_2_and_3(home: Path) -> None:
    unbroken = run(home, "layout", "stop_after_stage=3")
    run(home, "moved", "max_steps=4")
    run(home, "moved", "max_steps=7", ranks=1)
    run(home, "moved", "max_steps=10", zero="zero3")
    moved = run(home, "moved", "stop_after_stage=3")
    assert [row["step"] for row in moved.rows()] == list(range(1, 17))
    assert losses(moved) == pytest.approx(losses(unbroken), abs=1e-4)
    assert "written by 2 rank(s), read by 1" in moved.text and "written by 1 rank(s), read by 2" in moved.text
    print("LAYOUTS largest difference", max(abs(a - b) for a, b in zip(losses(moved), losses(unbroken), strict=True)))


def test_a_step_keeps_its_samples_where_their_number_follows_from_the_ranks(home: Path) -> None:
    batch = ("global_batch_size=null", "batch_size_training=16")
    unbroken = run(home, "by-rank", *batch, "max_steps=4")
    run(home, "by-rank-moved", *batch, "max_steps=2")
    moved = run(home, "by-rank-moved", *batch, "max_steps=4", ranks=1)
    assert losses(moved) == pytest.approx(losses(unbroken), abs=1e-4)
    assert "an optimizer step goes on to take 32 samples, now over 1 rank(s)" in moved.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; needs root."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_disk_that_fills_up_costs_checkpoints_but_no_valid_one(home: Path, small_disk: Path) -> None:
    options = (f"save_path={small_disk}", "save_every_n_steps=1", "stop_after_stage=0")
    full = start(home, "full", *options, "max_checkpoints=9", ranks=1)
    assert full.finish() == [2]  # the checkpoint of the stage's end cannot be left out
    assert "training goes on without a checkpoint: " in full.text and "are free; remove something" in full.text
    assert "error: " in full.text and "Traceback" not in full.text
    shutil.rmtree(min((small_disk / "full" / "checkpoints").glob("step-*")))  # a person makes room
    again = run(home, "full", *options, "max_checkpoints=1", ranks=1)
    assert "going on from " in again.text
    assert (small_disk / "full" / "stage_0" / "done.json").is_file()


def test_a_disk_too_full_for_a_model_costs_no_step(home: Path, small_disk: Path) -> None:
    ensure_model(home / "larger", seed=0, size=112, layers=6, force=False)  # than what a checkpoint leaves to spare
    options = (f"save_path={small_disk}", "stop_after_stage=0", f"model_id={home / 'larger'}")
    unseen = ("val_data_path=null", "advance_at=null", "stages.0.advance_at=null", "stages.last.advance_at=null")
    folder, filler = small_disk / "room", small_disk / "filler"
    run(home, "room", *options, *unseen, ranks=1)
    parts = [[f.stat().st_size for f in (folder / n).rglob("*") if f.is_file()] for n in ("checkpoints", "stage_0")]
    checkpoint, model = map(sum, parts)
    before = (folder / "stage_0" / "model.safetensors").read_bytes()
    shutil.rmtree(folder)

    def leave(n_bytes: int) -> None:
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - n_bytes))

    leave(model // 2)
    full = start(home, "best", *options, "eval_every_n_steps=3", ranks=1)
    assert full.finish() == [2]
    assert "training goes on without its best model so far: " in full.text and "Traceback" not in full.text

    leave(checkpoint + SPARE_BYTES)
    full = start(home, "room", *options, *unseen, ranks=1)
    assert full.finish() == [2]
    assert "stage_0 could not be written (" in full.text and "Traceback" not in full.text
    filler.unlink()
    again = run(home, "room", *options, *unseen, ranks=1)
    assert (folder / "stage_0" / "done.json").is_file()
    assert (folder / "stage_0" / "model.safetensors").read_bytes() == before
    # Once in the run that was measured, once in the start that found no room, and not again.
    assert again.text.count(" step 1/") == 2


def test_offloaded_state_goes_on_where_it_was(home: Path) -> None:
    unbroken = run(home, "on-device", "max_steps=6")
    run(home, "offloaded", "max_steps=3", zero="zero3_offload")
    assert losses(run(home, "offloaded", "max_steps=6", zero="zero3_offload")) == pytest.approx(
        losses(unbroken), abs=1e-4
    )
