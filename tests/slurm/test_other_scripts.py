"""The other scripts on the same cluster: evaluation of finished stages, shards made in parts, submitting, status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.runs import SMALL, TIMEOUT_S, Runs

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def output(home: Path, job: str, element: int, name: str) -> str:
    return (home / "slurm" / "logs" / f"{name}-{job}_{element}.out").read_text()


def test_an_array_evaluates_all_stages_and_reports_once(runs: Runs, unbroken: str) -> None:
    stages = range(runs.last + 1)
    words = ("slurm/coconut_eval.sh", "runs/unbroken", "--", "--data", "data/arrow_maze/shards/test", "--limit", "8")
    for _ in range(2):  # the second finds all of it answered
        job = runs.cluster.submit(f"--array=0-{runs.last + 1}", *words, cwd=runs.home)
        states = runs.cluster.wait(job, TIMEOUT_S)
        logs = [output(runs.home, job, element, "coconut-eval") for element in sorted(states)]
        assert set(states.values()) == {"COMPLETED"}, "\n".join(logs)
        assert sum("report: runs/unbroken/report/index.html" in log for log in logs) == 1
        assert "nothing to do: there are" in logs[-1]
    folder = runs.folder("unbroken")
    summaries = [json.loads((folder / "eval" / f"stage_{stage}" / "summary.json").read_text()) for stage in stages]
    assert [summary["n_samples"] for summary in summaries] == [8] * len(stages)
    page = (folder / "report" / "index.html").read_text()
    methods = ["CoT", *(f"Coconut, stage {stage}" for stage in stages[1:-1]), "Coconut"]
    assert all(f">{method}<" in page for method in methods)
    assert not list(folder.glob(".report-of-*")) and not list(folder.glob("eval/*/evaluated-*"))


def test_too_small_an_array_of_evaluations_is_refused(runs: Runs, unbroken: str) -> None:
    job = runs.cluster.submit("--array=0-0", "slurm/coconut_eval.sh", "runs/unbroken", "--", "--limit=1", cwd=runs.home)
    assert runs.cluster.wait(job, TIMEOUT_S) == {0: "FAILED"}
    assert f"submit with --array=0-{runs.last}" in output(runs.home, job, 0, "coconut-eval")


def test_shards_made_by_an_array_are_those_of_one_process(runs: Runs, project: Path, tmp_path: Path) -> None:
    data = runs.home / "records.jsonl"
    records = [{"id": f"k{n}", "question": f"how many {n} ?", "steps": ["one"], "answer": str(n)} for n in range(300)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = (str(data), "--shard-size", "0.05")
    job = runs.cluster.submit("--array=1-3", "slurm/make_shards.sh", *words, "--out", "shards", cwd=runs.home)
    assert runs.cluster.wait(job, TIMEOUT_S) == dict.fromkeys((1, 2, 3), "COMPLETED")
    alone = [sys.executable, "launch/make_shards.py", *words, "--out", str(tmp_path / "alone")]
    subprocess.run(alone, cwd=project, check=True, timeout=120)
    made, expected = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (runs.home / "shards", tmp_path / "alone"))
    assert made == expected and len(made) > 6
    job = runs.cluster.submit("--array=2-3", "slurm/make_shards.sh", *words, "--out", "shards", cwd=runs.home)
    assert runs.cluster.wait(job, TIMEOUT_S) == {2: "FAILED", 3: "FAILED"}
    assert "submit with --array=1-N" in output(runs.home, job, 2, "make-shards")


def submit_sh(runs: Runs, *words: str, check: bool = True) -> str:
    return runs.cluster.run("bash", "slurm/submit.sh", *words, cwd=runs.home, check=check)


def test_submit_shows_asks_and_says_where_a_run_stands(runs: Runs, unbroken: str) -> None:
    words = ("args/demo.yaml", f"max_latent_stage={runs.last}", *SMALL)
    shown = submit_sh(runs, "--dry-run", *words, "name=new", "--nodes=2")
    assert f"--array=0-{runs.last}%1" in shown and "--nodes=2" in shown and "to start at" in shown
    assert not (runs.home / "runs" / "new").exists() and not runs.cluster.run("squeue", "-h")
    assert "finished; nothing to submit" in submit_sh(runs, *words, "name=unbroken")
    done = " ".join(map(str, range(runs.last + 1)))
    status = submit_sh(runs, "--status", *words, "name=unbroken")
    assert f"finished: {done}\n" in status and "none in the queue" in status and "all stages are finished" in status
    refused = subprocess.run(
        ["bash", "slurm/submit.sh", *words, "name=new", "--nodes=9"],
        env=runs.cluster.environment,
        cwd=runs.home,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2 and "the scheduler would refuse this" in refused.stderr


def test_a_chain_of_jobs_trains_as_an_array_does(runs: Runs, unbroken: str) -> None:
    """For sites where users may not requeue: one job a stage."""
    if not runs.full:
        pytest.skip("trains a whole run once more; runs with launch/test.sh --full")
    words = ("args/demo.yaml", f"max_latent_stage={runs.last}", *SMALL, "name=chained", "--nodes=2")
    said = runs.cluster.run("bash", "slurm/submit.sh", "--chain", *words, cwd=runs.home, COCONUT_RANKS_PER_NODE="2")
    jobs = [line.split()[-1] for line in said.splitlines() if " is job " in line]
    assert len(jobs) == runs.last + 1
    assert f"job        {jobs[0]}" in submit_sh(runs, "--status", *words) or runs.cluster.states(jobs[0])
    for stage, job in enumerate(jobs):
        assert runs.cluster.wait(job, TIMEOUT_S) == {stage: "COMPLETED"}
    runs.assert_equal("unbroken", "chained")
