"""Evaluation on several real ranks, inside a ZeRO-3 engine whose weights are really released."""

from __future__ import annotations

from pathlib import Path

import pytest

from coconut.evaluation.result import EvaluationOptions
from coconut.evaluation.run import Job, evaluate_checkpoint
from tests.distributed.launcher import run_ranks

from .conftest import Maze


@pytest.mark.distributed
@pytest.mark.slow
def test_two_zero3_ranks_say_what_one_process_says(maze: Maze, tmp_path: Path) -> None:
    checkpoint, batch_size = maze.checkpoints[4], 9  # three batches of 24: one rank has less to do than the other
    options = EvaluationOptions(batch_size=batch_size, max_new_tokens=6, thoughts="noise")
    evaluate_checkpoint(checkpoint, [Job(maze.shards, tmp_path, options)], num_threads=1)
    arguments = [str(checkpoint), str(maze.shards), str(tmp_path / "predictions.jsonl"), str(batch_size)]
    assert "all equal: 24 samples" in run_ranks("tests.evaluation.zero3_worker", *arguments)
