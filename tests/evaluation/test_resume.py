"""An evaluation that is killed goes on; one that is complete is not repeated; any number of ranks says the same."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from coconut.evaluation.compare import compare, sign_flip
from coconut.evaluation.result import EvaluationOptions, EvaluationResult
from coconut.evaluation.run import Job, evaluate_checkpoint, plan_jobs
from coconut.model import MultimodalCoconut
from coconut.types import CheckpointError, ConfigError, DataError
from launch import evaluate as script

from .conftest import COCONUT, Maze

OPTIONS = EvaluationOptions(batch_size=5, max_new_tokens=4)  # 24 samples in 5 batches


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def run(maze: Maze, out: Path, options: EvaluationOptions = OPTIONS, fresh: bool = False) -> EvaluationResult:
    (result,) = evaluate_checkpoint(maze.checkpoints[4], [Job(maze.shards, out, options)], num_threads=1, fresh=fresh)
    return result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each generate call. Begun with [-n], it is killed at call n + 1."""
    made: list[int] = []
    generate = MultimodalCoconut.generate

    def counted(self: MultimodalCoconut, **arguments: Any) -> Any:
        if made and made[0] < 0 and len(made) > -made[0]:
            raise Killed
        made.append(len(arguments["input_ids"]))
        return generate(self, **arguments)

    monkeypatch.setattr(MultimodalCoconut, "generate", counted)
    return made


def test_what_was_killed_goes_on(maze: Maze, tmp_path: Path, calls: list[int]) -> None:
    whole = run(maze, tmp_path / "whole")
    calls[:] = [-2]
    with pytest.raises(Killed):
        run(maze, tmp_path / "killed")
    left = tmp_path / "killed" / ".partial"
    rank_file = left / "rank-0.jsonl"
    assert len(rank_file.read_text().splitlines()) == 2
    with rank_file.open("a") as file:
        file.write('{"batch": 2, "predictions": [{"ind')  # a line that the kill cut off
    calls[:] = []
    resumed = run(maze, tmp_path / "killed")
    assert calls == [5, 5, 4]
    assert resumed.predictions == whole.predictions
    assert not left.exists()


def test_batches_of_other_options_are_not_taken_over(maze: Maze, tmp_path: Path, calls: list[int]) -> None:
    calls[:] = [-2]
    with pytest.raises(Killed):
        run(maze, tmp_path)
    calls[:] = []
    run(maze, tmp_path, EvaluationOptions(batch_size=5, max_new_tokens=3))
    assert len(calls) == 5


def test_what_is_complete_is_read_again_unless_asked_anew(maze: Maze, tmp_path: Path, calls: list[int]) -> None:
    first = run(maze, tmp_path)
    n_calls = len(calls)
    again = run(maze, tmp_path)
    assert len(calls) == n_calls
    assert [asdict(p) for p in again.predictions] == [asdict(p) for p in first.predictions]
    assert again.spec == first.spec
    run(maze, tmp_path, fresh=True)
    assert len(calls) == 2 * n_calls
    good = (tmp_path / "predictions.jsonl").read_text()
    for damage in ("garbage\n", "", good.replace('"score": 0.0', '"score": null')):
        assert damage != good
        (tmp_path / "predictions.jsonl").write_text(damage)
        assert run(maze, tmp_path).predictions == first.predictions


def test_numbers_of_thoughts_are_tried(maze: Maze, tmp_path: Path) -> None:
    jobs = plan_jobs(maze.checkpoints[4], [maze.shards], tmp_path, OPTIONS, latents=script.read_numbers("0..2"))
    assert [job.out.name for job in jobs] == ["test", "test-latents_0", "test-latents_1", "test-latents_2"]
    results = evaluate_checkpoint(maze.checkpoints[4], jobs, num_threads=1)
    assert [r.mean("n_latents") for r in results] == [4, 0, 1, 2]
    assert script.read_numbers("3,1,3") == (3, 1)
    with pytest.raises(argparse.ArgumentTypeError, match=r"write 0\.\.4"):
        script.read_numbers("4..0")
    with pytest.raises(CheckpointError, match="no thoughts"):
        plan_jobs(maze.checkpoints[0], [maze.shards], tmp_path, OPTIONS, latents=[1])


def with_choices(maze: Maze, path: Path) -> Path:
    from coconut.data import open_dataset

    source, records = open_dataset(maze.shards), []
    for index in range(6):
        sample = source.read(index)
        image = sample.images[0]
        assert isinstance(image, bytes)
        (path.parent / f"{index}.png").write_bytes(image)
        others = [c for c in ("red", "blue", "green") if c != sample.answer][: 1 + index % 2]
        records.append(
            {"id": sample.key, "question": sample.question, "steps": list(sample.steps), "answer": sample.answer,
             "image": f"{index}.png", "choices": [*others, sample.answer]}
        )  # fmt: skip
    records[3]["answer"] = "none of them"
    path.write_text(json.dumps(records))
    return path


def test_other_images_are_another_evaluation(maze: Maze, tmp_path: Path, calls: list[int]) -> None:
    data = with_choices(maze, tmp_path / "choices.json")
    other = tmp_path / "other"
    other.mkdir()
    for index in range(6):
        (tmp_path / f"{index}.png").rename(other / f"{(index + 1) % 6}.png")
    texts = []
    for root in (other, other, tmp_path):
        if root == tmp_path:
            for index in range(6):
                (other / f"{(index + 1) % 6}.png").rename(tmp_path / f"{index}.png")
        (result,) = evaluate_checkpoint(
            maze.checkpoints[4], [Job(data, tmp_path / "out", OPTIONS)], image_root=root, num_threads=1
        )
        texts.append([p.prediction for p in result.predictions])
    assert len(calls) == 4  # two batches each; the second time nothing is asked
    assert texts[0] == texts[1] != texts[2]


def test_what_does_not_fit_is_counted_as_failed(maze: Maze, tmp_path: Path) -> None:
    data = with_choices(maze, tmp_path / "choices.json")
    records = json.loads(data.read_text())
    records[3] = {**records[3], "question": "start a4 ? " * 600}
    data.write_text(json.dumps(records))
    (result,) = evaluate_checkpoint(maze.checkpoints[4], [Job(data, tmp_path / "out", OPTIONS)], num_threads=1)
    assert result.n_samples == 6
    assert [p.index for p in result.predictions if p.error] == [3]
    assert "the model reads 256 at most" in str(result.predictions[3].error)


def test_choices_by_likelihood_are_those_of_the_loss(maze: Maze, tmp_path: Path) -> None:
    from coconut.data import open_dataset
    from coconut.evaluation.loaded import load

    data = with_choices(maze, tmp_path / "choices.json")
    options = EvaluationOptions(batch_size=4, metric="choice", by="likelihood")
    (result,) = evaluate_checkpoint(maze.checkpoints[4], [Job(data, tmp_path / "out", options)], num_threads=1)
    bad = result.predictions[3]
    assert (bad.correct, bad.score) == (False, 0.0)
    assert bad.error is not None
    assert "none of its" in bad.error
    assert result.n_samples == 6  # it stays in the denominator
    assert "6 samples, 1 of them not asked or not scored)" in result.headline()
    loaded, source = load(maze.checkpoints[4]), open_dataset(data)
    for p in result.predictions[:3]:
        sample = source.read(p.index)
        assert p.choice_nats is not None
        for text, nats in zip(sample.choices, p.choice_nats, strict=True):
            spoken = replace(sample, answer=text)
            features = loaded.encoder.with_stage(loaded.encoder.encode(spoken), loaded.spec, loaded.model.latent_ids)
            batch = loaded.collator([features])
            loss = loaded.model(**batch, num_items_in_batch=1.0, loss_only=True).loss
            assert nats == pytest.approx(-float(loss), rel=1e-4)
        assert p.predicted_answer == sample.choices[p.choice_nats.index(max(p.choice_nats))]


def test_likelihood_is_for_choices() -> None:
    with pytest.raises(ConfigError, match="set metric to choice"):
        EvaluationOptions(by="likelihood")


def test_two_evaluations_are_compared(
    tmp_path: Path, write_evaluation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_evaluation(tmp_path / "a", COCONUT, [True] * 10 + [False] * 10)
    write_evaluation(tmp_path / "b", COCONUT, [True] * 9 + [False] + [True] * 8 + [False] * 2)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.only == (1, 8)
    assert found.difference.mean == pytest.approx(7 / 20)
    assert found.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert script.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "+35.00 points" in capsys.readouterr().out
    write_evaluation(tmp_path / "c", COCONUT, [True])
    with pytest.raises(DataError, match="not of the same questions"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(DataError, match="contains a, b, c"):
        compare(tmp_path, tmp_path / "a")


def test_questions_of_one_key_must_be_the_same(tmp_path: Path, write_evaluation: Any) -> None:
    write_evaluation(tmp_path / "a", COCONUT, [True, False])
    predictions = write_evaluation(tmp_path / "b", COCONUT, [True, False]) / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace("start a2 ?", "start d4 ?"))
    with pytest.raises(DataError, match=r"'test-000001' is 'start a2 \?' \('red'\) in the first, 'start d4 \?'"):
        compare(tmp_path / "a", tmp_path / "b")
    predictions.write_text(predictions.read_text().replace("test-000001", "test-000000"))
    with pytest.raises(DataError, match="b has 2 questions with 1 keys"):
        compare(tmp_path / "a", tmp_path / "b")
    assert script.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", "x"]) == 2


def test_random_signs() -> None:
    assert sign_flip([0.0, 0.0], 0) == 1.0
    assert sign_flip([0.5] * 12, 0) < 0.01
    assert sign_flip([0.5, -0.5] * 6, 0) == 1.0
    assert sign_flip([0.3] * 10 + [-0.1] * 30, 0) == 1.0  # no difference but for the last digit of the sum


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--out", "x"]) == 2
    assert "--checkpoint, --data missing" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.slow
def test_one_two_and_three_ranks_say_the_same_to_the_last_digit(maze: Maze, tmp_path: Path, project: Path) -> None:
    data = with_choices(maze, tmp_path / "choices.json")
    written = {}
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "launch/evaluate.py"]
        command += ["--checkpoint", str(maze.checkpoints[4]), "--data", str(data), "--out", str(out)]
        command += ["--batch-size", "2", "--metric", "choice", "--by", "likelihood", "--thoughts", "noise"]
        done = subprocess.run(command, cwd=project, env=dict(os.environ), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        summary = json.loads((out / "summary.json").read_text())
        kept = {k: summary[k] for k in summary if k not in ("seconds_per_sample", "machine", "peak_memory_mb")}
        written[ranks] = ((out / "predictions.jsonl").read_bytes(), kept)
    assert written[1] == written[2] == written[3]
