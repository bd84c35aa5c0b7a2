"""Run and evaluation folders, read and put in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coconut.evaluation import collect
from coconut.training.run_folder import set_aside
from coconut.types import DataError

from .conftest import COCONUT, COT, NO_COT, Maze

Write = Callable[..., Path]


def test_methods_are_named_by_what_their_stage_asks_for(tmp_path: Path, write_evaluation: Write) -> None:
    for name, spec in {"cot": COT, "latent": COCONUT, "none": NO_COT}.items():
        write_evaluation(tmp_path / name, spec, [True])
    read = [collect.read_evaluation(path) for path in collect.find_evaluations(tmp_path)]
    assert [e.method for e in read] == ["CoT", "Coconut", "no-CoT"]
    assert collect.read_evaluation(tmp_path / "cot", "mine").method == "mine"


def test_changes_and_other_data_are_variants_of_a_method(tmp_path: Path, maze: Maze, write_evaluation: Write) -> None:
    write_evaluation(tmp_path / "a", COCONUT, [True], shuffle_images=True)
    write_evaluation(tmp_path / "b", COCONUT, [True], data=maze.shards.with_name("test_paths"))
    write_evaluation(tmp_path / "c", COCONUT, [True])
    write_evaluation(tmp_path / "d", COCONUT, [True], thoughts="noise")
    write_evaluation(tmp_path / "e", COT, [True])
    coconut, cot = collect.group_methods([collect.read_evaluation(tmp_path / name) for name in "abcde"])
    assert list(coconut.variants) == ["", "images shuffled", "noise for thoughts", "on test_paths"]
    assert coconut.plain[0].folder == tmp_path / "c"
    assert list(cot.variants) == [""]


def test_runs_of_a_method_stand_together_and_repetitions_replace(tmp_path: Path, write_evaluation: Write) -> None:
    write_evaluation(tmp_path / "a", COCONUT, [True], checkpoint="one/final")
    write_evaluation(tmp_path / "b", COCONUT, [True], checkpoint="two/final")
    write_evaluation(tmp_path / "c", COCONUT, [False], checkpoint="one/final")
    (method,) = collect.group_methods([collect.read_evaluation(tmp_path / name) for name in "abc"])
    assert [e.folder.name for e in method.plain] == ["b", "c"]


def test_earlier_latent_stages_are_methods_of_their_own(tmp_path: Path, write_evaluation: Write) -> None:
    write_evaluation(tmp_path / "a", COCONUT, [True])
    write_evaluation(tmp_path / "b", replace(COCONUT, stage=2), [True], checkpoint="run/stage_2")
    write_evaluation(tmp_path / "c", COT, [True])
    read = [collect.read_evaluation(tmp_path / name) for name in "abc"]
    assert [e.method for e in collect.name_stages(read)] == ["Coconut", "Coconut, stage 2", "CoT"]
    # Without the last stage beside it, the run's configuration tells that stage 2 of 4 is not the whole.
    read[1].summary["metadata"]["config"]["max_latent_stage"] = 4
    assert [e.method for e in collect.name_stages(read[1:])] == ["Coconut, stage 2", "CoT"]


def test_cost_and_seed_come_from_the_checkpoint(tmp_path: Path, write_evaluation: Write) -> None:
    evaluation = collect.read_evaluation(write_evaluation(tmp_path, COCONUT, [True], seed=5))
    assert evaluation.cost == {"samples": 19880, "steps": 625, "flops": 5.2e13}
    assert evaluation.seed == "seed 5"


def test_floors_are_found_beside_the_data(tmp_path: Path, maze: Maze, write_evaluation: Write) -> None:
    evaluation = collect.read_evaluation(write_evaluation(tmp_path, COCONUT, [True]))
    assert collect.read_floors([evaluation]) == {"uniform chance": 0.125, "look-up from start cell": 0.34}
    elsewhere = collect.read_evaluation(write_evaluation(tmp_path, COCONUT, [True], data=tmp_path / "x" / "y"))
    assert collect.read_floors([elsewhere]) == {}


def test_stages_of_a_run_are_bands_that_touch(tmp_path: Path, write_run: Write) -> None:
    run = collect.read_run(write_run(tmp_path / "run"))
    assert run.stage_bounds == [(0, 0, 60), (1, 60, 120)]
    assert run.name == "Coconut"
    assert collect.read_run(write_run(tmp_path / "other", config="- nothing")).name == "other"


def test_a_run_that_was_moved_aside_is_no_other_run_unless_it_is_asked_for(
    tmp_path: Path, write_run: Write, write_evaluation: Write
) -> None:
    run, own_name = write_run(tmp_path / "run"), write_run(tmp_path / "old-1")
    write_evaluation(run / "stage_4" / "test", COCONUT, [True])
    metrics = (run / "metrics.jsonl").read_text()
    old = set_aside(run, ("metrics.jsonl", "stage_*"))
    assert old is not None
    (run / "metrics.jsonl").write_text(metrics)
    again = write_evaluation(run / "stage_4" / "test", COCONUT, [False])
    assert collect.find_runs(tmp_path) == [own_name, run]  # a folder may be called so outside of a run
    assert collect.find_runs(run) == [run] and collect.find_runs(old) == [old]
    assert collect.find_evaluations(tmp_path) == collect.find_evaluations(run) == [again]
    assert collect.find_evaluations(old) == [old / "stage_4" / "test"]


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_is_named(tmp_path: Path, write_run: Write) -> None:
    run = write_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    n_rows = len(collect.read_run(run).rows)
    path.write_text(path.read_text() + '{"kind": "train", "st')
    assert len(collect.read_run(run).rows) == n_rows
    path.write_text('{"kind": "train"\n' + path.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is no JSON"):
        collect.read_run(run)


def test_folders_that_hold_no_result_are_named(tmp_path: Path, write_evaluation: Write) -> None:
    with pytest.raises(DataError, match=r"no summary\.json"):
        collect.read_evaluation(tmp_path)
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        collect.read_run(tmp_path)
    write_evaluation(tmp_path / "e", COCONUT, [True])
    (tmp_path / "e" / "summary.json").write_text(json.dumps({"accuracy": 1.0}))
    with pytest.raises(DataError, match="damaged"):
        collect.read_evaluation(tmp_path / "e")


def test_spread() -> None:
    assert collect.spread([0.5]) == (0.5, 0.0, 0.5, 0.5)
    assert collect.spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 1.0, 3.0)
