"""Ranks that are killed at random moments, inside writing too, and go on: the unbroken run's weights, bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.training.ranks import Run, run, start

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

EVERY_STEP = ("save_every_n_steps=1", "max_checkpoints=2")
ASYNC = "async_checkpoints=true"
KILLS_A_RUN = 5


def kill_once(home: Path, name: str, settings: tuple[str, ...], zero: str, draw: random.Random, log: list[str]) -> bool:
    """Start or go on, and kill one rank or all at a random moment; False when the run was faster."""
    victims = draw.choice([[0], [1], [0, 1]])
    if draw.random() < 0.5:
        which = "*" if len(victims) == 2 else str(victims[0])
        # Rank 0 makes some 7 such calls a checkpoint, the others one.
        number = draw.randint(1, 30 if 0 in victims else 4)
        run_ = start(home, name, *settings, zero=zero, fault=f"save@{which}:{number}")
        log.append(f"rank {which} at write {number}")
    else:
        run_ = start(home, name, *settings, zero=zero)
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


@pytest.mark.parametrize(("zero", "extra"), [("zero2", ()), ("zero3", ()), ("zero3", (ASYNC,))])
def test_killed_runs_end_as_the_unbroken_one(home: Path, full: bool, zero: str, extra: tuple[str, ...]) -> None:
    """The unbroken run always writes its checkpoints between steps."""
    case, settings = "-".join((zero, *extra)), (*EVERY_STEP, *extra)
    unbroken = run(home, f"unbroken-{case}", *EVERY_STEP, zero=zero)
    expected = everything(unbroken)
    assert len(expected) == 3
    kills, log, began = 0, [], time.monotonic()
    for number in range(100):
        draw = random.Random(f"{case}-{number}")
        name = f"killed-{case}-{number}"
        for _ in range(KILLS_A_RUN):
            kills += kill_once(home, name, settings, zero, draw, log)
        killed = run(home, name, *settings, zero=zero)
        assert [(row["step"], row["loss"]) for row in killed.rows()] == [
            (row["step"], row["loss"]) for row in unbroken.rows()
        ], log
        found = everything(killed)
        assert found.keys() == expected.keys() and all(found[name] == expected[name] for name in expected), log
        assert not list(killed.folder.glob(".*.old")) and not list((killed.folder / "checkpoints").glob(".*"))
        if kills >= (20 if full else 3):
            break
    print(f"TORTURE {case}: {kills} kills in {number + 1} run(s), {time.monotonic() - began:.0f} s: {'; '.join(log)}")


def test_training_on_during_a_write_changes_nothing(home: Path) -> None:
    """Each checkpoint of a run that writes in the background is, bit for bit, that of one that waits."""
    settings = ("save_every_n_steps=2", "max_checkpoints=100", "max_steps=12")
    waiting = run(home, "waits", *settings, zero="zero3")
    # A write takes longer than two steps, and the next one waits for it.
    training_on = run(home, "trains-on", *settings, ASYNC, zero="zero3", fault="slow@*:5")
    lines = training_on.text.splitlines()
    begun = next(number for number, line in enumerate(lines) if "writing, while training goes on" in line)
    complete = next(number for number, line in enumerate(lines) if "complete: " in line)
    assert any("step " in line for line in lines[begun + 1 : complete])  # the log of a step
    names = [[path.relative_to(one.folder) for path in checkpoint_files(one)] for one in (waiting, training_on)]
    assert names[0] == names[1] and len(names[0]) >= 12
    for name in names[0]:
        assert (waiting.folder / name).read_bytes() == (training_on.folder / name).read_bytes(), name


def test_a_rank_that_dies_while_weights_are_read_is_not_blamed_on_the_weights(home: Path) -> None:
    """Exit code 2 would tell the scheduler that a restart cannot help."""
    one = start(home, "dies-early", zero="zero3", fault="load@1:0")
    codes = one.finish(120)
    assert codes[1] == -9 and codes[0] not in (0, 2), one.text[-3000:]
    assert "cannot load weights" not in one.text


def checkpoint_files(of: Run) -> list[Path]:
    return sorted((of.folder / "checkpoints").glob("step-*/rank-*.safetensors"))
