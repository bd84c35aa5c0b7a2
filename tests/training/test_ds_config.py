"""Every "auto" of a DeepSpeed file is resolved, and what says two things at once is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coconut.config import Config
from coconut.config.deepspeed import batch_geometry, resolve_ds_config
from coconut.types import ConfigError


def resolve(tmp_path: Path, content: dict, world_size: int = 2, **keys) -> dict:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return resolve_ds_config(Config({"deepspeed": str(path), **keys}), world_size=world_size, hidden_size=64)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_files_resolve(project: Path, name: str) -> None:
    config = Config(
        {"deepspeed": str(project / "ds_configs" / f"{name}.json"), "learning_rate": 3e-4, "max_grad_norm": 0.5}
    )
    resolved = resolve_ds_config(config, world_size=2, hidden_size=64)
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["optimizer"]["params"]["lr"] == 3e-4
    assert resolved["train_batch_size"] == 16 and resolved["train_micro_batch_size_per_gpu"] == 8


def test_missing_keys_are_set_where_deepspeed_has_a_default_of_its_own(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, {"zero_optimization": {"stage": 2}}, max_grad_norm=0.0)
    assert resolved["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1.0
    assert resolved["bf16"] == {"enabled": False}
    assert resolved["optimizer"]["type"] == "AdamW"


def test_all_contradictions_come_at_once(tmp_path: Path) -> None:
    content = {
        "gradient_clipping": 0.3, "bf16": {"enabled": True}, "scheduler": {"type": "WarmupLR"}, "aio": {"x": "auto"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path, content, max_grad_norm=1.0)
    message = str(caught.value)
    for part in ("gradient_clipping is 0.3", "max_grad_norm asks for 1.0", "bf16", "scheduler", 'aio.x is "auto"'):
        assert part in message, message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            "zero_optimisation is no name that DeepSpeed knows; did you mean zero_optimization?",
        ),
        ({"bfloat16": {"enabled": True}}, "bfloat16 is no name that DeepSpeed knows; did you mean bf16?"),
        ({"amp": {"enabled": True}}, "DeepSpeed refuses it: NVIDIA Apex AMP integration has been removed"),
        (
            {"zero_optimization": {"overlap_com": True}},
            "zero_optimization.overlap_com is no name that DeepSpeed knows; did you mean overlap_comm?",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "many"}},
            "zero_optimization.reduce_bucket_size is 'many'; DeepSpeed says: Input should be a valid integer",
        ),
        ({"fp16": {"los_scale": 0}}, "fp16.los_scale is no name that DeepSpeed knows"),
        ({"prescale_gradients": "yes"}, "prescale_gradients is 'yes'; it has to be true or false"),
        ({"gradient_predivide_factor": True}, "gradient_predivide_factor is True; it has to be a number"),
        ({"tensorboard": {"enabeld": True}}, "\n  - tensorboard.enabeld is no name that DeepSpeed knows"),
        ({"optimizer": {"type": "AdamX", "params": {}}}, "optimizer.type is 'AdamX'; choose AdamW, another"),
        ({"optimizer": {"type": "Optimizers"}}, "optimizer.type is 'Optimizers'; choose AdamW, another"),
        ({"optimizer": {}}, "optimizer.type is None; choose AdamW, another"),
        ({"optimizer": {"type": "AdamW", "params": 3}}, "optimizer.params is 3; it has to be a JSON object"),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params is [1]; it has to be a JSON object"),
        (
            {"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.9]}}},
            "optimizer.params cannot be given to torch's SGD: SGD.__init__() got an unexpected keyword argument",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "betas": [0.9, 1.5]}}},
            "optimizer.params cannot be given to torch's AdamW: Invalid beta parameter at index 1: 1.5",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": ["auto", 0.9]}}},
            'optimizer.params.betas.0 is "auto", which has no meaning here',
        ),
    ],
)
def test_what_deepspeed_would_refuse_later_or_overlook(tmp_path: Path, change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=r"ds\.json") as caught:
        resolve(tmp_path, change)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"wall_clock_breakdown": True, "steps_per_print": 10, "gradient_predivide_factor": 2},
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}, "zero_allow_untested_optimizer": True},
        {"optimizer": {"type": "adam", "params": {"betas": [0.9, 0.95]}}, "communication_data_type": "fp32"},
        {"flops_profiler": {"enabled": True}, "comms_logger": {"enabled": True}, "aio": {"thread_count": 2}},
        {"csv_monitor": {"enabled": True}, "activation_checkpointing": {}, "data_types": {}, "timers": {}},
        {"checkpoint": {"load_universal": True}, "wandb": {"enabled": False}, "zero_force_ds_cpu_optimizer": False},
    ],
)
def test_what_deepspeed_knows_is_the_users_to_set(tmp_path: Path, change: dict) -> None:
    resolved = resolve(tmp_path, change)
    assert {name: resolved[name] for name in change if name != "optimizer"} == {
        name: value for name, value in change.items() if name != "optimizer"
    }
    assert resolved["zero_optimization"] == {"stage": 0}  # where the file says nothing


@pytest.mark.parametrize("text", ["{", "[]", pytest.param("[" * 100_000, id="deep")])
def test_broken_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"ds\.json"):
        resolve_ds_config(Config({"deepspeed": str(tmp_path / "ds.json")}), world_size=1, hidden_size=8)
    (tmp_path / "ds.json").unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_ds_config(Config({"deepspeed": str(tmp_path / "ds.json")}, validate=False), world_size=1, hidden_size=8)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_global_batch_size_does_not_depend_on_ranks(world: int) -> None:
    geometry = batch_geometry(Config({"global_batch_size": 32, "batch_size_training": 16}), world)
    assert geometry.samples == 32
    assert geometry.slots % world == 0 and geometry.slots == geometry.accumulation * world
    assert geometry.micro_batch <= 16 and geometry.micro_batch * geometry.slots >= 32


def test_without_it_ranks_add_up() -> None:
    config = Config({"batch_size_training": 4, "gradient_accumulation_steps": 3})
    assert batch_geometry(config, 2).samples == 24
