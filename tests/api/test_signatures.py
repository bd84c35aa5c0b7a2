"""Every class, method and function of the API document is there, with its parameters in order and their defaults."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest

REQUIRED = object()

#: What the document says: "module:name" -> parameters without self, each with its default.
DOCUMENTED: dict[str, dict[str, Any]] = {
    "coconut:Config": {"config_dict": REQUIRED},
    "coconut:Config.to_dict": {},
    "coconut:Config.update": {"**kwargs": REQUIRED},
    "coconut:Config.get": {"key": REQUIRED, "default": None},
    "coconut:Config.has": {"key": REQUIRED},
    "coconut:Config.merge": {"other_config": REQUIRED},
    "coconut:Config.save": {"path": REQUIRED},
    "coconut:load_config": {"config_path": REQUIRED, "validate": True},
    "coconut:validate_config": {"config": REQUIRED},
    "coconut:create_config_from_template": {"template_name": REQUIRED, "**overrides": REQUIRED},
    "coconut.model:MultimodalCoconut": {
        "base_model": REQUIRED,
        "latent_token_id": REQUIRED,
        "start_latent_id": REQUIRED,
        "end_latent_id": REQUIRED,
        "eos_token_id": REQUIRED,
    },
    "coconut.model:MultimodalCoconut.forward": {
        "input_ids": REQUIRED,
        "pixel_values": None,
        "attention_mask": None,
        "position_ids": None,
        "image_flags": None,
        "past_key_values": None,
        "labels": None,
        "use_cache": None,
        "output_attentions": None,
        "output_hidden_states": None,
        "return_dict": None,
    },
    "coconut.model:MultimodalCoconut.generate": {
        "pixel_values": None,
        "input_ids": None,
        "attention_mask": None,
        "image_flags": None,
        "visual_features": None,
        "generation_config": None,
        "**generate_kwargs": REQUIRED,
    },
    "coconut.model:MultimodalCoconut.from_pretrained": {"model_id": REQUIRED, "config": None},
    "coconut.data:MultimodalDataset": {
        "data_path": REQUIRED,
        "tokenizer": REQUIRED,
        "image_processor": REQUIRED,
        "max_size": None,
        "image_root": None,
    },
    "coconut.data:MultimodalDataset.__getitem__": {"index": REQUIRED},
    "coconut.data:MultimodalDataset.tokenize_multimodal_sample": {"sample": REQUIRED},
    "coconut.data:MultimodalCollator": {"tokenizer": REQUIRED, "image_processor": REQUIRED, "latent_id": REQUIRED},
    "coconut.data:MultimodalCollator.__call__": {"features": REQUIRED},
    "coconut.data:ImageProcessor": {
        "image_size": 448,
        "max_num_patches": 12,
        "use_thumbnail": True,
        "dynamic_preprocess": True,
    },
    "coconut.data:ImageProcessor.process_image": {"image_path": REQUIRED},
    "coconut.data:ImageProcessor.process_images": {"image_paths": REQUIRED},
    "coconut.training:MultimodalCoTTrainer": {
        "model": REQUIRED,
        "tokenizer": REQUIRED,
        "image_processor": REQUIRED,
        "config": REQUIRED,
    },
    "coconut.training:MultimodalCoTTrainer.train": {},
    "coconut.training:MultimodalCoTTrainer.train_epoch": {
        "epoch": REQUIRED,
        "dataloader": REQUIRED,
        "optimizer": REQUIRED,
    },
    "coconut.training:MultimodalCoTTrainer.validate": {"dataloader": REQUIRED},
    "coconut.training:MultimodalCoTTrainer.save_checkpoint": {"epoch": REQUIRED, "metrics": REQUIRED},
    "coconut.training:StageManager": {"max_latent_stage": REQUIRED, "epochs_per_stage": REQUIRED, "c_thought": 2},
    "coconut.training:StageManager.get_current_stage": {"epoch": REQUIRED},
    "coconut.training:StageManager.prepare_stage_data": {"dataset": REQUIRED, "stage": REQUIRED},
    "coconut.training:StageManager.get_stage_config": {"stage": REQUIRED},
    "coconut:init_distributed_training": {},
    "coconut:is_main_process": {},
    "coconut:setup_logging": {"config": REQUIRED},
    "coconut:get_logger": {"name": REQUIRED},
    "coconut:set_seed": {"seed": REQUIRED},
}
#: Parameters that the document requires and we let a caller leave out.
MAY_BE_LEFT_OUT = {"config_dict", "image_processor", "latent_id", "optimizer"}


def find(path: str) -> Any:
    module, _, names = path.partition(":")
    value = import_module(module)
    for name in names.split("."):
        value = getattr(value, name)
    return value


def parameters_of(path: str) -> list[inspect.Parameter]:
    value = find(path)
    parameters = list(inspect.signature(value).parameters.values())
    is_unbound = "." in path.partition(":")[2] and parameters[:1] and parameters[0].name == "self"
    return parameters[1:] if is_unbound else parameters


@pytest.mark.parametrize("path", DOCUMENTED)
def test_parameters_stand_in_the_documented_order_with_the_documented_defaults(path):
    documented = DOCUMENTED[path]
    ours = {("**" if p.kind is p.VAR_KEYWORD else "") + p.name: p for p in parameters_of(path)}
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [name for name in documented if not name.startswith("**")]
    assert positional[: len(named)] == named
    assert {name for name in documented if name.startswith("**")} <= set(ours)
    for name in named:
        default = ours[name].default
        if documented[name] is not REQUIRED:
            assert default == documented[name], name
        elif default is not inspect.Parameter.empty:
            assert name in MAY_BE_LEFT_OUT, f"{name} is required by the document, and has the default {default!r}"


@pytest.mark.parametrize("path", DOCUMENTED)
def test_no_undocumented_parameter_is_required(path):
    extra = [p for p in parameters_of(path) if p.name not in DOCUMENTED[path] and f"**{p.name}" not in DOCUMENTED[path]]
    assert all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in extra), extra


def test_documented_classes_are_of_the_documented_kinds():
    from torch import nn
    from torch.utils.data import Dataset
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from coconut.config import ConfigError
    from coconut.data import MultimodalDataset
    from coconut.model import CoconutOutput, MultimodalCoconut

    assert issubclass(MultimodalCoconut, nn.Module)
    assert issubclass(CoconutOutput, CausalLMOutputWithPast)
    assert issubclass(MultimodalDataset, Dataset)
    assert issubclass(ConfigError, Exception)
    assert isinstance(inspect.getattr_static(MultimodalCoconut, "from_pretrained"), classmethod)
