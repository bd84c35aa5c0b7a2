"""The curriculum: stages of epochs, settings of stages, and lazy views of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from torch.utils.data import IterableDataset

from coconut.config import Config, load_config
from coconut.training.inputs import training_mixture
from coconut.training.stages import StageManager
from coconut.types import ConfigError, EncodedText, StageSpec


def test_epochs_follow_stages_and_are_capped() -> None:
    stages = StageManager(max_latent_stage=3, epochs_per_stage=2)
    assert [stages.get_current_stage(epoch) for epoch in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert StageManager(3, 2, method="cot").get_current_stage(7) == 0
    with pytest.raises(ValueError, match="epoch is -1"):
        stages.get_current_stage(-1)


def test_stage_config_has_the_documented_keys() -> None:
    stages = StageManager(4, 5, c_thought=2, learning_rate=3e-4)
    assert stages.get_stage_config(2) == {
        "stage": 2, "n_skip_steps": 2, "n_latents": 4, "c_thought": 2, "learning_rate": 3e-4, "epochs": 5,
    }  # fmt: skip
    assert stages.get_stage_config(0)["n_latents"] == 0
    assert stages.get_stage_config(5)["n_skip_steps"] is None  # after stage K all written steps are gone
    assert stages.get_stage_config(5)["n_latents"] == 8


def test_epochs_beyond_the_stages_drop_all_steps() -> None:
    assert StageManager(2, 5, num_epochs=15).stages == [0, 1, 2]
    longer = StageManager(2, 5, num_epochs=22)
    assert longer.stages == [0, 1, 2, 3]
    assert longer.settings(3).epochs == 7
    assert StageManager(2, 5, method="no_cot", num_epochs=9).settings(0).epochs == 9


def test_settings_of_single_stages_win() -> None:
    config = Config(
        {
            "learning_rate": 1e-3,
            "advance_at": 0.96,
            "max_latent_stage": 2,
            "stages": {0: {"learning_rate": 2e-3, "epochs": 12}, "last": {"uniform_prob": 0.0, "advance_at": None}},
        }
    )
    stages = StageManager.from_config(config)
    assert (stages.settings(0).learning_rate, stages.settings(0).epochs) == (2e-3, 12)
    assert (stages.settings(1).learning_rate, stages.settings(1).advance_at) == (1e-3, 0.96)
    assert stages.settings(2).uniform_prob == 0.0
    assert stages.settings(2).advance_at is None
    assert stages.settings(1).uniform_prob == 0.1


def test_cot_is_trained_as_stage_0_is_and_other_single_stages_as_the_run_says(project: Path) -> None:
    demo = project / "args" / "demo.yaml"
    coconut, cot, no_cot = (
        StageManager.from_config(load_config(demo, validate=False, overrides=[f"method={method}"]))
        for method in ("coconut", "cot", "no_cot")
    )
    assert cot.settings(0) == coconut.settings(0)
    assert (cot.settings(0).learning_rate, cot.settings(0).epochs, cot.settings(0).advance_at) == (2e-3, 20, 0.99)
    assert (no_cot.settings(0).learning_rate, no_cot.settings(0).epochs, no_cot.settings(0).advance_at) == (
        1e-3,
        8,
        0.96,
    )
    longer = StageManager.from_config(Config({"method": "cot", "num_epochs": 10, "stages": {0: {"warmup_steps": 7}}}))
    assert (longer.settings(0).epochs, longer.settings(0).warmup_steps) == (10, 7)  # what stage 0 leaves open


def test_cot_reads_the_data_of_stage_0() -> None:
    for method, path in (("cot", "zero"), ("no_cot", "run"), ("coconut", "zero")):
        config = Config({"method": method, "train_data_path": "run", "stages": {0: {"train_data_path": "zero"}}})
        assert training_mixture(config, StageManager.from_config(config), 0) == {path: 1.0}


def test_impossible_numbers_are_named() -> None:
    with pytest.raises(ConfigError, match="c_thought is 0"):
        StageManager(3, 2, c_thought=0)


class _Encoder:
    def with_stage(self, features: dict, spec: StageSpec, ids: tuple[int, int, int]) -> dict:
        return {**features, "spec": spec, "ids": ids}


class _Tokenizer:
    name_or_path = "tiny"

    def get_vocab(self) -> dict[str, int]:
        return {"<|start-latent|>": 6, "<|latent|>": 7, "<|end-latent|>": 8}


class _Map:
    tokenizer, encoder = _Tokenizer(), _Encoder()
    read: ClassVar[list[int]] = []

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        self.read.append(index)
        return {"text": EncodedText(str(index), (), (), ())}


class _Stream(IterableDataset):
    tokenizer, encoder = _Tokenizer(), _Encoder()

    def __iter__(self):
        return iter([{"number": number} for number in range(3)])

    def __getitem__(self, index: int):  # torch defines it for every Dataset; an iterable one is still no map
        raise NotImplementedError


def test_views_are_lazy_and_keep_their_kind() -> None:
    stages = StageManager(3, 2, c_thought=2)
    view = stages.prepare_stage_data(_Map(), 2)
    assert len(view) == 3 and not _Map.read
    assert view[1]["spec"].n_latents == 4 and view[1]["ids"] == (6, 7, 8)
    assert set(_Map.read) == {1}
    items = list(stages.prepare_stage_data(_Stream(), 1))
    assert [item["number"] for item in items] == [0, 1, 2] and items[0]["spec"].stage == 1


def test_a_run_may_begin_at_a_later_stage() -> None:
    stages = StageManager(3, 2, start_stage=1)
    assert stages.stages == [1, 2, 3]
    assert [stages.get_current_stage(epoch) for epoch in range(7)] == [1, 1, 2, 2, 3, 3, 3]
    with pytest.raises(ConfigError, match="start_stage is 4"):
        StageManager(3, 2, start_stage=4)
    with pytest.raises(ConfigError, match="single stage"):
        StageManager(3, 2, method="pause", start_stage=1)


def test_icot_removes_more_tokens_at_each_stage_and_sometimes_one_more() -> None:
    stages = StageManager(3, 2, method="icot", icot_tokens=5, icot_smoothing=1.0)
    specs = [stages.spec_of_sample(f"key {n}", 9, 2, seed=0, epoch=0) for n in range(50)]
    assert {spec.n_skip_tokens for spec in specs} >= {10, 11}
    assert stages.spec(3).n_skip_steps is None
    without = StageManager(3, 2, method="icot", icot_tokens=5, icot_smoothing=None)
    assert {without.spec_of_sample(f"key {n}", 9, 2, seed=0, epoch=0).n_skip_tokens for n in range(50)} == {10}
