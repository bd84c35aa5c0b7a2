"""Stages that end after steps, on a plateau or with other batches; their best and last models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from coconut.config import Config
from coconut.training.batches import stage_geometry
from coconut.training.export import settle_best
from coconut.training.schedule import is_at_bound, is_validation_due, reason_to_end
from coconut.training.stages import StageManager
from coconut.training.state import TrainState
from coconut.types import ConfigError
from tests.training.ranks import Run, run

BY_EPOCHS = StageManager(2, 3).settings(0)
BY_STEPS = StageManager(2, 3, steps_per_stage=7).settings(0)


def score(accuracy: float, full_match: float = 0.0, loss: float = 1.0) -> dict[str, float]:
    return {"accuracy": accuracy, "full_match": full_match, "loss": loss}


def test_a_stage_ends_after_its_epochs_or_in_their_place_its_steps() -> None:
    assert (BY_EPOCHS.epochs, BY_EPOCHS.steps, BY_STEPS.epochs, BY_STEPS.steps) == (3, None, None, 7)
    assert not is_at_bound(TrainState(stage_epoch=3, stage_step=30), BY_EPOCHS, epoch_ended=False)
    assert is_at_bound(TrainState(stage_epoch=3, stage_step=30), BY_EPOCHS, epoch_ended=True)
    assert not is_at_bound(TrainState(stage_epoch=9, stage_step=6), BY_STEPS, epoch_ended=True)
    assert is_at_bound(TrainState(stage_step=7), BY_STEPS, epoch_ended=False)


def test_validation_is_due_by_epochs_or_by_steps_and_at_the_end_of_a_stage() -> None:
    def due(
        state: TrainState, settings=BY_EPOCHS, ended: bool = False, epochs: int = 2, steps: int | None = None
    ) -> bool:
        return is_validation_due(state, settings, ended, epochs, steps)

    assert [due(TrainState(stage_epoch=e, stage_step=4 * e, step=9), ended=True) for e in (1, 2, 3)] == [
        False,
        True,
        True,
    ]
    assert [due(TrainState(stage_step=s, step=s), steps=2) for s in range(5)] == [False, False, True, False, True]
    assert not due(TrainState(stage_step=4, step=4, validated_step=4), steps=2)  # a second look would say the same
    assert due(TrainState(stage_step=7, step=9), BY_STEPS)


def test_a_plateau_ends_a_stage_after_its_least_steps_and_goes_on_where_it_was() -> None:
    settings = replace(BY_EPOCHS, patience=2, min_steps=5)
    state = TrainState()
    ends, bests = [], []
    for accuracy in (0.5, 0.55, 0.58, 0.59, 0.4, 0.72, 0.7):
        state.step = state.stage_step = state.step + 1
        bests.append(state.judge(score(accuracy), "accuracy", min_delta=0.1))
        ends.append(reason_to_end(state, settings) is not None)
        state = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert bests == [True, True, True, True, False, True, False]
    # No gain over 0.5 in steps 2 to 5: 0.58 is the second such validation, but the least steps are not done before 5.
    assert ends == [False, False, False, False, True, False, False]
    assert (state.best_score, state.best_step, state.validations_without_gain) == (0.72, 6, 1)


def test_a_validation_that_is_nan_is_no_gain_and_hides_none_after_it() -> None:
    state = TrainState(step=1)
    assert not state.judge(score(0.0, loss=math.nan), "loss", 0.0)
    assert (state.best_score, state.validations_without_gain) == (None, 1)
    assert state.judge(score(0.1, loss=9.0), "loss", 0.0)
    assert (state.best_score, state.validations_without_gain) == (-9.0, 0)
    assert not state.judge(score(0.0, loss=math.nan), "loss", 0.0) and state.best_score == -9.0


def test_least_loss_is_best_and_a_target_ends_a_stage_at_once() -> None:
    state = TrainState(step=1)
    assert state.judge(score(0.1, loss=2.0), "loss", 0.0) and not state.judge(score(0.9, loss=3.0), "loss", 0.0)
    state.judge(score(0.9, full_match=0.97), "loss", 0.0)
    assert reason_to_end(state, replace(BY_EPOCHS, advance_at=0.96)) == "97.0% of the texts match"


def test_settings_of_stages_follow_the_run_unless_they_are_their_own() -> None:
    stages = {0: {"epochs": 4, "patience": 5}, 1: {"c_thought": 3, "min_steps": 9}, "last": {"steps": 12}}
    config = Config({"max_latent_stage": 2, "c_thought": 1, "steps_per_stage": 50, "stages": stages})
    manager = StageManager.from_config(config)
    assert [(manager.settings(k).epochs, manager.settings(k).steps) for k in range(3)] == [
        (4, None),
        (None, 50),
        (None, 12),
    ]
    assert [manager.settings(k).patience for k in range(3)] == [5, None, None]
    assert [manager.settings(k).min_steps for k in range(3)] == [0, 9, 0]
    assert [manager.spec(k).n_latents for k in range(4)] == [0, 3, 2, 2]
    assert manager.stages == [0, 1, 2]  # no stage of the epochs that are left, as nobody knows how many are
    mixed = {manager.spec_of_sample(f"key {n}", 9, 2, seed=0, epoch=0).n_latents for n in range(200)}
    assert mixed == {0, 2, 3}


def test_a_run_key_of_either_kind_replaces_what_lower_layers_say_of_stages() -> None:
    lower = Config({"stages": {0: {"epochs": 4}, 1: {"steps": 5}}})
    assert lower.merge(Config({"steps_per_stage": 9})).stages == {}
    assert lower.merge(Config({"epochs_per_stage": 9})).stages == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": {1: {"epochs": 2, "steps": 3}}}, r"stages\.1\.steps = 3 with epochs = 2: keep one of them"),
        ({"stages": {1: {"global_batch_size": 4}}}, r"stages\.1\.batch_size_training = 8: is more than global_batch"),
        (
            {"global_batch_size": 8, "stages": {1: {"gradient_accumulation_steps": 2}}},
            r"stages\.1\.gradient_accumulation_steps = 2 with global_batch_size = 8: keep one",
        ),
        ({"stages": {1: {"c_thought": 0}}}, r"stages\.1\.c_thought = 0: must be at least 1"),
    ],
)
def test_contradictions_are_named(settings: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Config(settings)


def test_each_stage_has_its_own_step_whatever_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(
        {"batch_size_training": 4, "stages": {1: {"batch_size_training": 2, "gradient_accumulation_steps": 6}}}
    )
    state = TrainState(stage=1, group=2, samples_per_step=24)
    sizes = {}
    for world in (1, 2, 4):
        monkeypatch.setattr("coconut.training.batches.get_world_size", lambda world=world: world)
        sizes[world] = [(g.samples, g.accumulation) for g in (stage_geometry(config, k, state) for k in (0, 1, 2))]
    assert sizes == {1: [(8, 2), (24, 12), (8, 2)], 2: [(8, 1), (24, 6), (8, 1)], 4: [(8, 1), (24, 3), (8, 1)]}


@pytest.mark.parametrize("best_step", [6, 4])
def test_a_best_model_that_the_run_does_not_know_is_moved_aside(tmp_path: Path, best_step: int) -> None:
    folder = tmp_path / "stage_1_best"
    folder.mkdir()
    (folder / "coconut.json").write_text(json.dumps({"metadata": {"state": {"step": 6}}}))
    settle_best(tmp_path, 1, best_step)
    assert folder.is_dir() == (best_step == 6)
    assert (tmp_path / "old-1" / "stage_1_best" / "coconut.json").is_file() == (best_step != 6)


# -- runs --

PLATEAU = (
    "start_stage=1",
    "stop_after_stage=2",
    "steps_per_stage=20",
    "eval_every_n_steps=2",
    "validation_metric=loss",
    "early_stopping_min_delta=100",  # nothing is a gain after the first validation
    "early_stopping_patience=2",
    "stages.2.patience=1",
    "stages.2.global_batch_size=64",
    "stages.2.c_thought=2",
    "advance_at=null",
)  # fmt: skip


def saved(folder: Path) -> dict:
    return json.loads((folder / "coconut.json").read_text())


@pytest.mark.slow
@pytest.mark.distributed
def test_a_plateau_is_resumed_in_its_middle_with_other_ranks_and_batches(home: Path) -> None:
    unbroken = run(home, "plateau", *PLATEAU, zero="zero3")
    assert [row["step"] for row in unbroken.rows("val")] == [2, 4, 6, 8, 10]
    stages = unbroken.rows("stage")
    assert [(row["stage"], row["step"], row["n_latents"]) for row in stages] == [(1, 6, 1), (2, 10, 4)]
    assert stages[1]["samples"] == 6 * 32 + 4 * 64

    run(home, "plateau-moved", *PLATEAU, "max_steps=5", zero="zero3")
    run(home, "plateau-moved", *PLATEAU, "max_steps=7", zero="zero2", ranks=1)  # two micro-batches a step in stage 2
    moved = run(home, "plateau-moved", *PLATEAU, zero="zero3_offload")
    for kind in ("train", "val"):
        ours, theirs = moved.rows(kind), unbroken.rows(kind)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-4)
    assert [row["step"] for row in moved.rows("stage")] == [6, 10]
    _best_and_last(unbroken)
    _best_and_last(moved)


def _best_and_last(run_: Run) -> None:
    for row in run_.rows("stage"):
        validations = [val for val in run_.rows("val") if val["stage"] == row["stage"]]
        best = min(validations, key=lambda val: val["loss"])
        kept = saved(run_.folder / f"stage_{row['stage']}_best")["metadata"]
        assert kept["state"]["step"] == best["step"] == row["best_step"]
        assert kept["validation"]["loss"] == best["loss"] == -row["best_score"]
        last = saved(run_.folder / f"stage_{row['stage']}")["metadata"]
        assert (last["state"]["step"], last["validation"]["loss"]) == (row["step"], validations[-1]["loss"])
