"""The files of args/ and ds_configs/: sound, honest about themselves, and in step with the templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coconut.config import create_config_from_template, load_config

ARGS = (
    *("base", "coconut", "cot", "debug", "demo", "eval", "large", "multimodal_coconut"),
    *("prosqa_gpt2", "prosqa_recite", "prosqa_small"),
)
ENGINES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def test_all_files_are_here(project: Path) -> None:
    assert sorted(file.stem for file in (project / "args").glob("*.yaml")) == list(ARGS)
    assert sorted(file.stem for file in (project / "ds_configs").glob("*.json")) == list(ENGINES)


@pytest.mark.parametrize("name", ARGS)
def test_each_is_sound(project: Path, name: str) -> None:
    config = load_config(project / "args" / f"{name}.yaml", validate=False)
    assert config.faults == ()
    assert config.notes == ()


@pytest.mark.parametrize("name", ARGS)
def test_each_opens_with_command_cost_and_score(project: Path, name: str) -> None:
    head = (project / "args" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for label in ("# Command:", "# Cost:", "# Expect:"):
        assert label in head
    assert f"args/{name}.yaml" in head or name == "demo"  # demo is what launch/train.py takes by itself


@pytest.mark.parametrize("name", ["cot", "coconut", "eval", "debug"])
def test_a_template_is_its_file_without_model_and_data(project: Path, name: str) -> None:
    template = create_config_from_template(name).to_dict()
    file = load_config(project / "args" / f"{name}.yaml", validate=False).to_dict()
    of_the_machine = {"model_id", "load_model_path", "image_root", "bf16", "gradient_checkpointing"}
    differing = {key for key in template if template[key] != file[key]}
    assert {key for key in differing if not key.endswith("_data_path")} <= of_the_machine


def test_the_demo_is_the_recipe_that_was_found(project: Path) -> None:
    config = load_config(project / "args" / "demo.yaml", validate=False)

    def stage(k: int) -> list[Any]:
        return [config.stage_setting(k, name) for name in ("learning_rate", "epochs", "uniform_prob", "advance_at")]

    assert stage(0) == [2e-3, 20, 0.0, 0.99]
    assert stage(1) == stage(2) == stage(3) == [1e-3, 8, 0.25, 0.96]
    assert stage(4) == [3e-4, 12, 0.0, 0.99]
    assert (config.global_batch_size, config.warmup_steps, config.samples_per_epoch) == (32, 100, 5000)


def test_typed_overrides_reach_every_stage_of_the_demo(project: Path) -> None:
    overrides = ["learning_rate=5e-6", "max_latent_stage=6"]
    config = load_config(project / "args" / "demo.yaml", validate=False, overrides=overrides)
    assert {config.stage_setting(k, "learning_rate") for k in range(7)} == {5e-6}
    assert config.stage_setting(6, "uniform_prob") == 0.0


@pytest.mark.parametrize(("name", "stage"), ENGINES.items())
def test_engine_files(project: Path, name: str, stage: int) -> None:
    content = json.loads((project / "ds_configs" / f"{name}.json").read_text())
    assert content["zero_optimization"]["stage"] == stage
    assert content["gradient_clipping"] == "auto"  # DeepSpeed clips at 1.0 where it is missing
    assert content["optimizer"]["params"]["torch_adam"] is True
    explained = (project / "ds_configs" / "README.md").read_text()
    for key in [*content, *content["zero_optimization"]]:
        assert (
            key in explained
            or key in ("optimizer", "bf16", "fp16", "zero_optimization", "stage")
            or key in UNREMARKABLE
        )


#: DeepSpeed's ordinary choices for its stages.
UNREMARKABLE = {"overlap_comm", "contiguous_gradients", "offload_optimizer", "offload_param"}
