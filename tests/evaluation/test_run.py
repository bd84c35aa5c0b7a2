"""Checkpoints evaluated from their folders, with real models, tokenizers and shards."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from coconut.evaluation.result import EvaluationOptions
from coconut.evaluation.run import (
    _forget_peak_memory,
    _peak_memory_mb,
    evaluate_checkpoint,
    find_checkpoint,
    plan_jobs,
    require_thoughts,
)
from coconut.types import CheckpointError, ConfigError
from launch import evaluate as script

from .conftest import Maze


def run_script(maze: Maze, out: Path, *arguments: str, stage: int = 4) -> list[dict[str, Any]]:
    words = ["--checkpoint", str(maze.checkpoints[stage]), "--data", str(maze.shards), "--out", str(out)]
    assert script.main([*words, "--max-new-tokens", "4", *arguments]) == 0
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_a_checkpoint_is_evaluated_from_its_folder(
    maze: Maze, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_script(maze, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["key"] for row in rows] == [f"test-{i:06d}" for i in range(24)]
    assert all(row["n_latents"] == 4 and row["passes"] == 4 + row["n_generated"] for row in rows)
    assert summary["accuracy"] == sum(row["correct"] for row in rows) / 24
    assert summary["checkpoint"] == str(maze.checkpoints[4])
    assert summary["metadata"]["state"]["step"] == 20
    # 0.2 M parameters, 16 image tokens and a dozen more: millions of operations, not thousands or billions.
    assert 5e6 < summary["flops_per_sample"] < 1e8
    assert "24 samples" in capsys.readouterr().out


def test_predictions_are_those_of_the_model_asked_one_by_one(maze: Maze, tmp_path: Path) -> None:
    assert run_script(maze, tmp_path / "many", "--batch-size", "24") == run_script(
        maze, tmp_path / "one", "--batch-size", "1"
    )


def test_controls_change_what_they_are_named_for(maze: Maze, tmp_path: Path) -> None:
    checkpoint = maze.checkpoints[4]
    jobs = plan_jobs(checkpoint, [maze.shards], tmp_path, EvaluationOptions(max_new_tokens=4), controls=True)
    assert [job.out.name for job in jobs] == ["test", "test-images_shuffled", "test-noise"]
    plain, shuffled, noise = evaluate_checkpoint(checkpoint, jobs, num_threads=1)
    said = [[p.prediction for p in result.predictions] for result in (plain, shuffled, noise)]
    assert said[0] != said[1]
    assert said[0] != said[2]
    for before, after in zip(plain.predictions, shuffled.predictions, strict=True):
        assert before.images_from is None
        assert after.images_from not in (None, after.key)
        assert (before.question, before.answer) == (after.question, after.answer)
    assert all((job.out / "summary.json").is_file() for job in jobs)


def test_shuffled_samples_are_shown_the_named_image(
    maze: Maze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coconut.data import ImageProcessor, open_dataset
    from coconut.model import MultimodalCoconut

    seen: list[torch.Tensor] = []
    generate = MultimodalCoconut.generate

    def watched(self: MultimodalCoconut, **arguments: Any) -> torch.Tensor:
        seen.append(arguments["pixel_values"])
        return generate(self, **arguments)

    monkeypatch.setattr(MultimodalCoconut, "generate", watched)
    rows = run_script(maze, tmp_path, "--shuffle-images", "--limit", "5")
    source, processor = open_dataset(maze.shards), ImageProcessor.from_pretrained(maze.checkpoints[4])
    for row, tile in zip(rows, seen[0], strict=True):
        donor = source.read(int(row["images_from"].removeprefix("test-")))
        assert torch.equal(processor.process_image(donor.images[0])[0], tile)


def test_a_stage_without_latents_has_no_noise_to_try(maze: Maze, tmp_path: Path) -> None:
    jobs = plan_jobs(maze.checkpoints[0], [maze.shards], tmp_path, EvaluationOptions(), controls=True)
    assert [job.out.name for job in jobs] == ["test", "test-images_shuffled"]


def test_images_that_are_not_there_are_not_shuffled(
    maze: Maze, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "words.json"
    rows = [{"question": "start a4 ?", "steps": [], "answer": "b2"} for _ in range(3)]
    data.write_text(json.dumps(rows))
    jobs = plan_jobs(maze.checkpoints[4], [data], tmp_path, EvaluationOptions(max_new_tokens=4), controls=True)
    assert [job.out.name for job in jobs] == ["words", "words-noise"]
    logger = logging.getLogger("coconut")  # does not propagate, once it writes to the console
    logger.addHandler(caplog.handler)
    evaluate_checkpoint(maze.checkpoints[4], jobs[:1], num_threads=1)
    logger.removeHandler(caplog.handler)
    assert "none of the first 3 samples has an image" in caplog.text


def test_controls_stay_below_out(maze: Maze, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(maze.shards)
    jobs = plan_jobs(maze.checkpoints[0], [Path()], tmp_path, EvaluationOptions(), controls=True)
    assert [job.out.relative_to(tmp_path).name for job in jobs] == ["test", "test-images_shuffled"]


def test_a_single_job_writes_to_the_folder_itself(maze: Maze, tmp_path: Path) -> None:
    jobs = plan_jobs(maze.checkpoints[0], [maze.shards], tmp_path, EvaluationOptions())
    assert [job.out for job in jobs] == [tmp_path]
    with pytest.raises(ConfigError, match="same name"):
        plan_jobs(maze.checkpoints[0], [maze.shards, maze.shards], tmp_path, EvaluationOptions())


def test_a_run_folder_stands_for_its_final_checkpoint(maze: Maze, tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "coconut.json").write_text("{}")
    assert find_checkpoint(tmp_path) == find_checkpoint(final) == final
    with pytest.raises(CheckpointError, match=r"coconut.json is a file; give its folder"):
        find_checkpoint(final / "coconut.json")
    (tmp_path / "runs/maze").mkdir(parents=True)
    final.rename(tmp_path / "runs/maze/final")
    with pytest.raises(CheckpointError, match="contains maze/final"):
        find_checkpoint(tmp_path / "runs")
    with pytest.raises(CheckpointError, match="contains stage_0, stage_4"):
        find_checkpoint(maze.checkpoints[0].parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--checkpoint": "nowhere"}, "checkpoint nowhere does not exist"),
        ({"--data": "nowhere.json"}, "data nowhere.json does not exist"),
        ({"--batch-size": "0"}, "batch_size is 0"),
        ({"--data": "{empty}"}, "holds no shards"),
        ({"--seed": "-1"}, "seed is -1"),
        ({"--metric": "choice"}, "(key test-000000): the answer"),
        ({"--latents": "4,100000"}, "100000 latents are more than fit"),
        ({"--out": "{empty}/file/out"}, "/file (Not a directory)"),
    ],
)
def test_a_mistake_gives_one_line_and_code_2(
    change: dict[str, str], message: str, maze: Maze, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"--checkpoint": str(maze.checkpoints[4]), "--data": str(maze.shards), "--out": str(tmp_path / "out")}
    (tmp_path / "file").touch()
    words |= {name: value.format(empty=tmp_path) for name, value in change.items()}
    assert script.main([word for pair in words.items() for word in pair]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_peak_of_memory_is_that_of_one_job() -> None:
    import numpy as np

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of the resident set cannot be reset here")
    before = _peak_memory_mb()
    np.ones(40_000_000).sum()  # 320 MB, given back
    assert _peak_memory_mb() > before + 250
    _forget_peak_memory()
    assert _peak_memory_mb() < before + 100


def test_a_checkpoint_without_a_stage_is_refused(
    tmp_path: Path, maze: Maze, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "coconut.json").write_text('{"stage_spec": null}')
    assert script.main(["--checkpoint", str(tmp_path), "--data", str(maze.shards), "--out", str(tmp_path / "o")]) == 2
    assert "names no stage" in capsys.readouterr().err
    for spec in ("{}", "[1]", '{"stage": "x", "n_latents": 1}'):
        (tmp_path / "coconut.json").write_text(f'{{"stage_spec": {spec}}}')
        with pytest.raises(CheckpointError, match="is damaged"):
            require_thoughts(tmp_path)


@pytest.mark.parametrize("name", ["evaluate.py", "report.py", "probe.py", "generate.py", "export.py"])
def test_help_is_quick_and_needs_no_torch(name: str, project: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}', '--help']\n"
        "try:\n"
        f"    runpy.run_path('launch/{name}', run_name='__main__')\n"
        "except SystemExit:\n"
        "    heavy = {'torch', 'transformers', 'matplotlib', 'deepspeed'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert time.perf_counter() - started < 2
