"""`sbatch slurm/coconut_stage.sh` on a real scheduler: order, failure, interruption, requeue, refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TIMEOUT_S = 600
SMALL = ["stages.0.epochs=1", "epochs_per_stage=1", "stages.last.epochs=1", "samples_per_epoch=128"]
SMALL += ["global_batch_size=8", "batch_size_training=2", "max_val_samples=8", "log_every_n_steps=1"]
STEPS = 16  # of a stage


class Runs:
    """Submits runs of the small maze on two nodes, and reads what they left."""

    def __init__(self, cluster: Cluster, home: Path, full: bool) -> None:
        self.cluster, self.home, self.full = cluster, home, full
        self.last = 4 if full else 1

    def submit(self, name: str, *words: str, options: tuple[str, ...] = (), **environment: str) -> str:
        array = () if any(option.startswith("--array") for option in options) else (f"--array=0-{self.last}%1",)
        ranks = "2" if self.full else "1"
        return self.cluster.submit(
            *("--nodes=2", *array, *options, "slurm/coconut_stage.sh", "args/demo.yaml"),
            *(f"name={name}", f"max_latent_stage={self.last}", *SMALL, *words),
            cwd=self.home,
            COCONUT_RANKS_PER_NODE=ranks,
            **environment,
        )

    def folder(self, name: str) -> Path:
        return self.home / "runs" / name

    def log(self, job: str, element: int) -> str:
        path = self.home / "slurm" / "logs" / f"coconut-{job}_{element}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, last: int | None = None) -> None:
        """Wait for the end of the array; every element has to end well."""
        states = self.cluster.wait(job, TIMEOUT_S)
        logs = "\n".join(self.log(job, element) for element in states)
        assert states == dict.fromkeys(range((self.last if last is None else last) + 1), "COMPLETED"), logs[-6000:]

    def history(self, name: str) -> list[tuple[str, str]]:
        """(element, what happened), in order."""
        lines = (self.folder(name) / "slurm" / "history.tsv").read_text().splitlines()
        return [(words[1].split("_")[1], words[4]) for words in (line.split("\t") for line in lines)]

    def metrics(self, name: str, kind: str = "train") -> list[dict]:
        path = self.folder(name) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["kind"] == kind]

    def wait_for_step(self, name: str, job: str, step: int) -> None:
        def is_there() -> bool:
            assert set(self.cluster.states(job).values()) & {"RUNNING", "PENDING"}, self.history(name)
            return any(row["step"] >= step for row in self.metrics(name))

        wait_until(is_there, f"step {step} of {name}", TIMEOUT_S)

    def assert_equal(self, one: str, other: str) -> None:
        """The same losses at each step, once each, and the same weights to the last bit."""
        first, second = self.metrics(one), self.metrics(other)
        assert [(row["step"], row["loss"]) for row in first] == [(row["step"], row["loss"]) for row in second]
        weights = [(self.folder(name) / "final" / "model.safetensors").read_bytes() for name in (one, other)]
        assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def runs(cluster: Cluster, home: Path, full: bool) -> Runs:
    return Runs(cluster, home, full)


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> str:
    """An array that nothing disturbs, one element longer than the run; its number."""
    end = runs.last + 1
    # Without %1 all elements start at once: the later ones have to step back.
    job = runs.submit("unbroken", options=(f"--array=0-{end}",))
    runs.wait(job, last=end)
    return job


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
        runs.submit("steps", options=(f"--array=0-{end}:2%1",)): "an array with steps leaves stages out",
        runs.submit("short", options=("--array=0-0",)): "this array ends before the last stage",
        runs.submit("late", options=(f"--array=1-{runs.last}",)): "stage 0 is not finished",
        runs.submit("again", "resume=none"): "choose another name",
        runs.submit("owned"): f"job {owner} owns runs/owned",
    }
    for job, reason in refused.items():
        states = runs.cluster.wait(job, TIMEOUT_S)
        first = min(states)
        assert states.pop(first) == "FAILED" and set(states.values()) <= {"CANCELLED", "FAILED"}
        assert reason in runs.log(job, first)
    assert not list((runs.home / "runs").glob("s*/checkpoints"))
    runs.cluster.run("scancel", owner)


def test_a_lock_of_a_job_that_is_gone_is_broken(runs: Runs, tmp_path: Path) -> None:
    owner = runs.cluster.submit("--wrap=true", cwd=tmp_path)
    runs.cluster.run("scancel", owner)
    folder = runs.folder("unbroken") / "slurm"
    (folder / "lock").write_text(f"{owner}\n")
    job = runs.submit("unbroken")
    runs.wait(job)
    assert f"took runs/unbroken over from job {owner}" in runs.log(job, 0)
    assert not (folder / "lock").exists()
