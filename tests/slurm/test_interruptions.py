"""What clusters do to long runs: each ends with the weights of the run that nothing disturbed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.runs import STEPS, TIMEOUT_S, Runs

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(autouse=True)
def only_in_full(full: bool) -> None:
    if not full:
        pytest.skip("interrupts runs in every way; runs with launch/test.sh --full")


def processes(**environment: str) -> Iterator[tuple[int, str]]:
    """(pid, command line) of the processes that have these variables."""
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # gone meanwhile
            continue


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_a_higher_partition_preempts(runs: Runs, unbroken: str) -> None:
    job = runs.submit("preempted")
    runs.wait_for_step("preempted", job, STEPS + 3)
    runs.cluster.submit("--partition=high", "--nodes=3", "--exclusive", "--wrap=sleep 3", cwd=runs.home)
    runs.wait(job)
    what = [text for element, text in runs.history("preempted") if element == "1"]
    assert "starts again: time limit or preemption" in what
    assert not [text for text in what if "died" in text]
    runs.assert_equal("unbroken", "preempted")


def test_a_time_limit_is_met_inside_a_stage(runs: Runs) -> None:
    """A first stage that takes longer than a minute or two: limits are whole minutes."""
    words = ("max_latent_stage=1", "samples_per_epoch=256", "stages.0.epochs=12")
    whole = runs.submit("at-once", *words, options=("--array=0-1%1",))
    runs.wait(whole, last=1)
    # The signal comes up to a minute before its time.
    limited = runs.submit("limited", *words, options=("--array=0-1%1", "--time=2", "--signal=B:USR1@45"))
    runs.wait(limited, last=1)
    assert "starts again: time limit or preemption" in [text for _, text in runs.history("limited")]
    runs.assert_equal("at-once", "limited")


def test_a_cancelled_array_is_submitted_again(runs: Runs, unbroken: str) -> None:
    job = runs.submit("cancelled")
    runs.wait_for_step("cancelled", job, 5)
    runs.cluster.run("scancel", job)
    assert set(runs.cluster.wait(job, TIMEOUT_S).values()) == {"CANCELLED"}
    wrong = runs.submit("cancelled", "seed=5")
    assert runs.cluster.wait(wrong, TIMEOUT_S)[0] == "FAILED"
    assert "is of another run" in runs.history("cancelled")[-1][1]  # and not that somebody had stopped it
    runs.wait(runs.submit("cancelled"))
    runs.assert_equal("unbroken", "cancelled")


def test_a_rank_is_killed(runs: Runs, unbroken: str) -> None:
    job = runs.submit("killed")
    runs.wait_for_step("killed", job, STEPS + 2)
    rank = [pid for pid, line in processes(SLURM_ARRAY_JOB_ID=job, RANK="1") if "launch/train.py" in line]
    os.kill(rank[0], signal.SIGKILL)
    runs.wait(job)
    assert [text for _, text in runs.history("killed") if text.startswith("starts again: the ranks of stage 1 died")]
    runs.assert_equal("unbroken", "killed")


def test_a_node_dies(runs: Runs, unbroken: str) -> None:
    """Its slurmd and all that it started are killed; the job goes on on the spare node."""
    job = runs.submit("node-lost")
    runs.wait_for_step("node-lost", job, STEPS + 2)
    where = (runs.folder("node-lost") / "slurm" / "history.tsv").read_text().splitlines()[-1].split("\t")[3]
    lost = runs.cluster.run("scontrol", "show", "hostnames", where).split()[-1]
    daemon = int((runs.cluster.folder / "run" / f"slurmd.{lost}.pid").read_text())
    try:
        for pid in [daemon, *children(daemon), *(pid for pid, _ in processes(SLURMD_NODENAME=lost))]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        began = time.monotonic()
        runs.wait(job)
        print(f"a dead node: the run was finished {time.monotonic() - began:.0f} s later")
        runs.assert_equal("unbroken", "node-lost")
    finally:
        runs.cluster.start_node(lost)
        wait_until(lambda: lost in runs.cluster.idle_nodes(), f"{lost} idle again", TIMEOUT_S)


def test_a_slurmd_dies_and_its_ranks_train_on(runs: Runs) -> None:
    """The scheduler gives the node up; the restarted element finds the run folder held, stops the ranks and goes on."""
    words = ("max_latent_stage=1", "samples_per_epoch=256", "stages.0.epochs=40", "save_every_n_steps=20")
    job = runs.submit("orphans", *words, options=("--array=0-1%1", "--nodes=1"))
    runs.wait_for_step("orphans", job, 5)
    where = (runs.folder("orphans") / "slurm" / "history.tsv").read_text().splitlines()[-1].split("\t")[3]
    try:
        os.kill(int((runs.cluster.folder / "run" / f"slurmd.{where}.pid").read_text()), signal.SIGKILL)
        runs.wait(job, last=1)
        happened = "\n".join(text for _, text in runs.history("orphans"))
        assert "ranks of an earlier start still train: another run is writing to" in happened, happened
        steps = [row["step"] for row in runs.metrics("orphans")]
        assert steps == list(range(1, len(steps) + 1))
    finally:
        runs.cluster.start_node(where)
        wait_until(lambda: where in runs.cluster.idle_nodes(), f"{where} idle again", TIMEOUT_S)


def test_two_arrays_at_once(runs: Runs) -> None:
    """In two folders both train; in one, the second is refused and names the first."""
    one, two = (runs.submit(name, options=(f"--array=0-{runs.last}%1", "--nodes=1")) for name in ("left", "right"))
    wait_until(lambda: (runs.folder("left") / "slurm" / "lock").exists(), "the lock", TIMEOUT_S)
    again = runs.submit("left", options=(f"--array=0-{runs.last}%1", "--nodes=1"))
    states = runs.cluster.wait(again, TIMEOUT_S)
    assert states.pop(0) == "FAILED" and set(states.values()) <= {"CANCELLED"}
    assert f"job {one} owns runs/left" in runs.log(again, 0)
    runs.wait(one)
    runs.wait(two)
    runs.assert_equal("left", "right")
