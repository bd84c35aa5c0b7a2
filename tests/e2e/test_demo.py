"""The demo as a newcomer starts it: data, two trainings, evaluations, report. At full length, its scores too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_demo(project: Path, tmp_path: Path, full: bool) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "launch/demo.py", "--out", str(out), *([] if full else ["--quick"])]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=4500 if full else 1200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert str(out / "report" / "index.html") in done.stdout
    page = (out / "report" / "index.html").read_text()
    for method in ("CoT", "no-CoT", "Coconut"):
        assert method in page
    assert "http://" not in page and "<img" in page  # self-contained: nothing is fetched
    assert list((out / "report").glob("*.png"))

    rows = [json.loads(line) for line in (out / "coconut" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if row["kind"] == "stage"] == [0, 1, 2, 3, 4]
    steps = max(row["step"] for row in rows)
    no_cot = next(out.glob("no_cot*/metrics.jsonl")).read_text().splitlines()
    assert max(json.loads(line)["step"] for line in no_cot) >= steps
    first = next(row["loss"] for row in rows if row["kind"] == "train")
    last = [row["loss"] for row in rows if row["kind"] == "train" and row["stage"] == 0][-1]
    assert last < first

    cot, coconut = summary(out / "eval" / "cot" / "test"), summary(out / "eval" / "coconut" / "test")
    assert coconut["mean_latents"] == 4 and cot["mean_latents"] == 0
    if full:
        assert cot["accuracy"] >= 0.98 and coconut["accuracy"] >= 0.97
        assert coconut["mean_forward_passes"] <= 0.4 * cot["mean_forward_passes"]
        for method in ("cot", "coconut"):
            assert summary(out / "eval" / method / "test-images_shuffled")["accuracy"] <= 0.20


def test_a_finished_demo_is_not_done_again(project: Path, tmp_path: Path, full: bool) -> None:
    """Started a second time, it only says where the report is (with `--full` the first test covers enough)."""
    if not full:
        pytest.skip("takes a second quick demo; runs with launch/test.sh --full")
    out = tmp_path / "demo"
    command = [sys.executable, "launch/demo.py", "--out", str(out), "--quick"]
    for _ in range(2):
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "there already" in done.stdout and "deepspeed" not in done.stdout
