"""Ranks that are killed at random moments, inside writing too, and go on: the unbroken run's weights, bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.training.ranks import Run, run, start

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

EVERY_STEP = ("save_every_n_steps=1", "max_checkpoints=2")
KILLS_A_RUN = 5


def kill_once(home: Path, name: str, zero: str, draw: random.Random, log: list[str]) -> bool:
    """Start or go on, and kill one rank or all at a random moment; False when the run was faster."""
    victims = draw.choice([[0], [1], [0, 1]])
    if draw.random() < 0.5:
        which = "*" if len(victims) == 2 else str(victims[0])
        # Rank 0 makes some 7 such calls a checkpoint, the others one.
        number = draw.randint(1, 30 if 0 in victims else 4)
        run_ = start(home, name, *EVERY_STEP, zero=zero, fault=f"save@{which}:{number}")
        log.append(f"rank {which} at write {number}")
    else:
        run_ = start(home, name, *EVERY_STEP, zero=zero)
        delay = draw.uniform(0.5, 6.0)
        end = time.monotonic() + delay
        while time.monotonic() < end and any(process.is_alive() for process in run_.processes):
            time.sleep(0.005)
        run_.kill(victims)
        log.append(f"ranks {victims} after {delay:.2f} s")
    codes = run_.finish(120)
    assert 2 not in codes, run_.text[-5000:]  # no start ever found its checkpoints unusable
    return any(code != 0 for code in codes)


def everything(run_: Run) -> dict[str, bytes]:
    """The bytes of the model and of the last checkpoint's tensors."""
    last = sorted((run_.folder / "checkpoints").glob("step-*"))[-1]
    files = [run_.folder / "final" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_killed_runs_end_as_the_unbroken_one(home: Path, full: bool, zero: str) -> None:
    unbroken = run(home, f"unbroken-{zero}", *EVERY_STEP, zero=zero)
    expected = everything(unbroken)
    assert len(expected) == 3
    kills, log, began = 0, [], time.monotonic()
    for number in range(100):
        draw = random.Random(f"{zero}-{number}")
        name = f"killed-{zero}-{number}"
        for _ in range(KILLS_A_RUN):
            kills += kill_once(home, name, zero, draw, log)
        killed = run(home, name, *EVERY_STEP, zero=zero)
        assert [(row["step"], row["loss"]) for row in killed.rows()] == [
            (row["step"], row["loss"]) for row in unbroken.rows()
        ], log
        found = everything(killed)
        assert found.keys() == expected.keys() and all(found[name] == expected[name] for name in expected), log
        assert not list(killed.folder.glob(".*.old")) and not list((killed.folder / "checkpoints").glob(".*"))
        if kills >= (30 if full else 3):
            break
    print(f"TORTURE {zero}: {kills} kills in {number + 1} run(s), {time.monotonic() - began:.0f} s: {'; '.join(log)}")
