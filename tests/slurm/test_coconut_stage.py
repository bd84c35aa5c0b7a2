"""`sbatch slurm/coconut_stage.sh` on a real scheduler: order, failure, interruption, requeue, refusal."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.runs import STEPS, TIMEOUT_S, Runs

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_stages_run_in_order_each_from_the_one_before(runs: Runs, unbroken: str) -> None:
    stages = list(range(runs.last + 1))
    assert [row["stage"] for row in runs.metrics("unbroken", "stage")] == stages
    assert [row["step"] for row in runs.metrics("unbroken")] == list(range(1, STEPS * len(stages) + 1))
    starts = [what for _, what in runs.history("unbroken") if " starts" in what]
    expected = [f"stage {stage} starts from step-{stage * STEPS:08d}" for stage in stages[1:]]
    assert starts == ["stage 0 starts", *expected]
    assert "nothing to do: this run's last stage" in runs.log(unbroken, runs.last + 1)
    assert (runs.folder("unbroken") / "report" / "index.html").is_file()
    attempt = next((runs.folder("unbroken") / "slurm").glob(f"{unbroken}_0-restart-*/started.txt")).parent
    for node in ("n1", "n2"):
        assert "doctor: all is well" in (attempt / f"preflight-{node}.txt").read_text()
        assert list((attempt / f"node-{node}").rglob("stdout.log"))
    assert "revision" in (attempt / "started.txt").read_text()
    assert not (runs.folder("unbroken") / "slurm" / "lock").exists()


def test_last_element_requeued_runs_no_other_stage(runs: Runs, unbroken: str) -> None:
    before = (runs.folder("unbroken") / "metrics.jsonl").read_bytes()
    starts = [runs.log(unbroken, stage).count("] element ") for stage in range(runs.last + 1)]
    runs.cluster.run("scontrol", "requeue", f"{unbroken}_{runs.last}")
    wait_until(lambda: runs.log(unbroken, runs.last).count("] element ") > starts[-1], "the restart", TIMEOUT_S)
    runs.wait(unbroken, last=runs.last + 1)
    assert f"stage {runs.last} is finished already" in runs.log(unbroken, runs.last)
    again = [runs.log(unbroken, stage).count("] element ") for stage in range(runs.last + 1)]
    assert again == [*starts[:-1], starts[-1] + 1]
    assert (runs.folder("unbroken") / "metrics.jsonl").read_bytes() == before


def test_a_signal_and_a_requeue_inside_stages_change_nothing(runs: Runs, unbroken: str) -> None:
    job = runs.submit("disturbed")
    runs.wait_for_step("disturbed", job, 3)
    runs.cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    runs.wait_for_step("disturbed", job, STEPS + 2)
    runs.cluster.run("scontrol", "requeue", f"{job}_1")
    runs.wait(job)
    what = [text for element, text in runs.history("disturbed") if element == "0"]
    assert "starts again: time limit or preemption" in what
    resumed = [text for text in what if text.startswith("stage 0 starts from step-")]
    assert len(resumed) == 1 and 3 <= int(resumed[0][-8:]) < STEPS  # the signal, and no other, led to a checkpoint
    starts = [text for element, text in runs.history("disturbed") if element == "1" and " starts from" in text]
    assert len(starts) == 2 and starts[0].endswith(f"{STEPS:08d}")
    assert not [text for _, text in runs.history("disturbed") if "died" in text]
    runs.assert_equal("unbroken", "disturbed")


def test_a_failed_stage_cancels_the_later_ones_and_is_mended(runs: Runs) -> None:
    # Sixteen thoughts for each written step: 43 tokens at stage 0, 55 at stage 1.
    words = ("c_thought=16", "samples_per_epoch=32", "max_latent_stage=1")
    broken = runs.submit("mended", *words, "max_length=50", options=("--array=0-2%1",))
    states = runs.cluster.wait(broken, TIMEOUT_S)
    assert states == {0: "COMPLETED", 1: "FAILED", 2: "CANCELLED"}, runs.log(broken, 1)
    assert runs.cluster.run("squeue", "-h", "-t", "all", "-j", f"{broken}_2", "-o", "%r") == "DependencyNeverSatisfied"
    assert "more than max_length 50" in runs.history("mended")[-1][1]
    done = (runs.folder("mended") / "stage_0" / "done.json").stat().st_mtime_ns
    mended = runs.submit("mended", *words, options=("--array=0-1%1",), COCONUT_LAUNCHER="deepspeed")
    runs.wait(mended, last=1)
    assert (runs.folder("mended") / "stage_0" / "done.json").stat().st_mtime_ns == done
    assert "stage 0 is finished already" in runs.log(mended, 0)
    assert [row["stage"] for row in runs.metrics("mended", "stage")] == [0, 1]


def test_what_cannot_work_is_refused(runs: Runs, tmp_path: Path) -> None:
    owner = runs.cluster.submit("--begin=now+1hour", "--wrap=true", cwd=tmp_path)
    lock = runs.folder("owned") / "slurm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(f"{owner}\n")
    end = 2 * runs.last
    refused = {
        runs.submit("steps", options=(f"--array=0-{end}:2%1",)): "this array leaves stages out",
        runs.submit("gap", options=(f"--array=0,{end}%1",)): "this array leaves stages out",
        runs.submit("short", options=("--array=0-0",)): "this array ends before the last stage",
        runs.submit("late", options=(f"--array=1-{runs.last}",)): "stage 0 is not finished",
        runs.submit("anew", "resume=none"): "choose another name",
        runs.submit("anew", "resume=0"): "resume=none would begin there at every stage",  # the original's spelling
        runs.submit("wrong", "lerning_rate=3"): "unknown key; did you mean learning_rate?",
        runs.submit("owned"): f"job {owner} owns runs/owned",
    }
    for job, reason in refused.items():
        states = runs.cluster.wait(job, TIMEOUT_S)
        first = min(states)
        assert states.pop(first) == "FAILED" and set(states.values()) <= {"CANCELLED", "FAILED"}
        assert reason in runs.log(job, first)
    assert not list((runs.home / "runs").glob("s*/checkpoints"))
    runs.cluster.run("scancel", owner)


def test_a_node_that_is_unfit_is_left_out_though_the_job_has_no_other(runs: Runs) -> None:
    """Two of the three nodes fail the examination; a job of one node tries until it has the third."""
    broken = "case $SLURMD_NODENAME in n3) ;; *) export TORCH_EXTENSIONS_DIR=/nowhere ;; esac"
    options = ("--array=0-1%1", "--nodes=1")
    job = runs.submit("unfit", "max_latent_stage=1", "max_steps=2", options=options, COCONUT_SETUP=broken)
    assert runs.cluster.wait(job, TIMEOUT_S)[0] == "FAILED"
    assert "starts again: unfit: n" in runs.log(job, 0) and "on n3:" in runs.log(job, 0)
    assert "ended well without being finished: max_steps" in runs.history("unfit")[-1][1]
    everywhere = runs.submit(
        "unfit", "max_latent_stage=1", options=options, COCONUT_SETUP="export TORCH_EXTENSIONS_DIR=/nowhere"
    )
    assert runs.cluster.wait(everywhere, TIMEOUT_S)[0] == "FAILED"
    assert "has not 1 other node(s)" in runs.log(everywhere, 0)


def test_of_many_that_find_a_stale_lock_one_takes_it(runs: Runs, tmp_path: Path) -> None:
    """The scheduler knows all the jobs that ask, and not the one that the lock names."""
    jobs = [runs.cluster.submit("--begin=now+1hour", "--wrap=true", cwd=tmp_path) for _ in range(4)]
    take = """set -euo pipefail; ROOT=$PWD RUN=$1 ARRAY=$2 ELEMENT=$2_0 RESTARTS=0; . slurm/lib.sh
    until [ -e "$RUN/go" ]; do :; done; take_lock; echo taken by $ARRAY"""
    for round_ in range(5):
        run = tmp_path / str(round_)
        (run / "slurm").mkdir(parents=True)
        (run / "slurm" / "lock").write_text("99999\n")
        asking = [
            subprocess.Popen(
                ["bash", "-c", take, "-", str(run), job],
                cwd=runs.home,
                env=runs.cluster.environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for job in jobs
        ]
        time.sleep(0.2)
        (run / "go").touch()
        said = [process.communicate()[0] for process in asking]
        taken = [line for text in said for line in text.splitlines() if line.startswith("taken by")]
        assert len(taken) == 1 and (run / "slurm" / "lock").read_text().strip() == taken[0].split()[-1], said
    for job in jobs:
        runs.cluster.run("scancel", job)


def test_a_lock_of_a_job_that_is_gone_is_broken(runs: Runs, tmp_path: Path) -> None:
    owner = runs.cluster.submit("--wrap=true", cwd=tmp_path)
    runs.cluster.run("scancel", owner)
    folder = runs.folder("unbroken") / "slurm"
    (folder / "lock").write_text(f"{owner}\n")
    job = runs.submit("unbroken")
    runs.wait(job)
    assert f"took runs/unbroken over from job {owner}" in runs.log(job, 0)
    assert not (folder / "lock").exists()
