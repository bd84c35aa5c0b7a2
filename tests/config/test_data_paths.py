"""train_data_path: one path, or several with weights, for the run or for a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coconut.config import Config, ConfigError, load_config, validate_config
from coconut.config.data_paths import data_mixture


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json", "val.json"):
        Path(name).write_text("[]")
    (tmp_path / "model").mkdir()
    return tmp_path


def test_one_path_or_several_with_weights(folder: Path) -> None:
    Path("c.yaml").write_text(
        "model_id: ./model\ntrain_data_path:\n  b.json: 1e-1\n  a.json: 2\n"
        "stages: {1: {train_data_path: a.json}, last: {train_data_path: {b.json: 3, a.json: 1}}}\n"
    )
    config = load_config("c.yaml")
    assert config.train_data_path == {"b.json": 0.1, "a.json": 2.0}
    assert config.stage_setting(0, "train_data_path") == config.train_data_path
    assert config.stage_setting(1, "train_data_path") == "a.json"
    assert list(data_mixture(config.stage_setting(4, "train_data_path")).items()) == [("a.json", 1), ("b.json", 3)]
    config.save("saved.yaml")
    assert load_config("saved.yaml") == config
    assert data_mixture("x") == {"x": 1.0} and data_mixture(None) == {}


def test_on_the_command_line(folder: Path) -> None:
    Path("c.yaml").write_text("model_id: ./model\ntrain_data_path: a.json\nstages: {1: {train_data_path: a.json}}\n")
    config = load_config("c.yaml", overrides=["train_data_path={a.json: 3, b.json: 1}"])
    assert config.train_data_path == {"a.json": 3.0, "b.json": 1.0}
    assert config.stage_setting(1, "train_data_path") == config.train_data_path, "what was typed wins over the file"
    staged = load_config("c.yaml", overrides=["stages.0.train_data_path={b.json: 1}"])
    assert staged.stages[0] == {"train_data_path": {"b.json": 1.0}}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a.json": 0}, "gives a.json the weight 0; must be a number above 0"),
        ({"a.json": -1.5}, "gives a.json the weight -1.5"),
        ({"a.json": float("nan")}, "gives a.json the weight nan"),
        ({"a.json": float("inf")}, "gives a.json the weight inf"),
        ({"a.json": True}, "gives a.json the weight True"),
        ({"a.json": "much"}, "gives a.json the weight 'much'"),
        ({"a.json": None}, "gives a.json the weight None"),
        ({"": 1}, "holds '', which is no path"),
        ({}, "must be a path, or several with weights such as {data/a: 2, data/b: 1}"),
        (["a.json"], "must be a path, or several with weights"),
        ("", "must be text; write null for none"),
    ],
)
def test_what_is_no_mixture(value: Any, said: str) -> None:
    for settings in ({"train_data_path": value}, {"stages": {0: {"train_data_path": value}}}):
        with pytest.raises(ConfigError) as error:
            Config(settings)
        assert said in str(error.value)
        assert str(error.value).count("train_data_path = ") == 1 and "faults" not in str(error.value)


def test_each_path_must_be_there(folder: Path) -> None:
    settings = {"model_id": "./model", "train_data_path": {"a.json": 1, "nowhere": 2}}
    stages = {"stages": {1: {"train_data_path": {"gone": 1}}}}
    with pytest.raises(ConfigError) as error:
        validate_config(Config(settings | stages))
    assert "train_data_path = 'nowhere': does not exist" in str(error.value)
    assert "stages.1.train_data_path = 'gone': does not exist" in str(error.value)
    with pytest.raises(ConfigError, match="set allow_pipe_urls: true"):
        validate_config(Config(settings | {"train_data_path": {"a.json": 1, "pipe:cat {name}": 1}}))
