"""Multimodal CoCoNuT: vision-language models that reason in continuous latent space, trained with DeepSpeed.

    YAML -> config -> record -> Sample -> shard -> plan -> stage text -> Batch -> latent loop -> step -> checkpoint
            config    [............... data ...............................]   [ model ]     [.. training ..]
                                                                               answer -> score -> report
                                                                               [....... evaluation ......]

Layers, each importing only from those to its right:
``launch -> training -> evaluation -> data | model -> utils -> config -> types``.

The names below are loaded when first used, so that ``import coconut`` costs nothing and touches no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coconut.config import (
        Config,
        create_config_from_template,
        load_config,
        parse_overrides,
        validate_config,
    )
    from coconut.model import MultimodalCoconut
    from coconut.types import CheckpointError, CoconutError, ConfigError, DataError
    from coconut.utils.distributed import init_distributed_training, is_main_process
    from coconut.utils.logging import get_logger, setup_logging
    from coconut.utils.seed import set_seed
    from coconut.utils.tokenizer import load_tokenizer

__version__ = "0.1.0"

_HOME_OF = {
    "Config": "coconut.config",
    "create_config_from_template": "coconut.config",
    "load_config": "coconut.config",
    "parse_overrides": "coconut.config",
    "validate_config": "coconut.config",
    "MultimodalCoconut": "coconut.model",
    "CheckpointError": "coconut.types",
    "CoconutError": "coconut.types",
    "ConfigError": "coconut.types",
    "DataError": "coconut.types",
    "init_distributed_training": "coconut.utils.distributed",
    "is_main_process": "coconut.utils.distributed",
    "get_logger": "coconut.utils.logging",
    "setup_logging": "coconut.utils.logging",
    "set_seed": "coconut.utils.seed",
    "load_tokenizer": "coconut.utils.tokenizer",
}

__all__ = [
    "CheckpointError",
    "CoconutError",
    "Config",
    "ConfigError",
    "DataError",
    "MultimodalCoconut",
    "create_config_from_template",
    "get_logger",
    "init_distributed_training",
    "is_main_process",
    "load_config",
    "load_tokenizer",
    "parse_overrides",
    "set_seed",
    "setup_logging",
    "validate_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
