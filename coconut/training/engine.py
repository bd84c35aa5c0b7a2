"""The DeepSpeed engine: built from our configuration, with every "auto" resolved and the result on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from coconut.config.deepspeed import MONITORS, BatchGeometry, resolve_ds_config
from coconut.model import MultimodalCoconut
from coconut.types import ConfigError
from coconut.utils.distributed import get_local_rank, get_world_size, init_distributed_training, is_main_process
from coconut.utils.logging import get_logger

logger = get_logger(__name__)


def build_engine(
    model: MultimodalCoconut, config: Any, run_dir: Path | None, geometry: BatchGeometry | None = None
) -> Any:
    """Hand `model` to a DeepSpeed engine, which owns optimizer, gradients and precision from then on, but no monitors.

    Args:
        model: its weights may already be partitioned (ZeRO-3).
        config: the run configuration.
        run_dir: the resolved DeepSpeed configuration is written to ``ds_config.json`` there; None: nowhere.
        geometry: of a resumed run's steps; None: as the configuration says.

    Raises:
        ConfigError: the two configurations contradict each other, or nothing is left to train.
    """
    init_distributed_training(force=True)
    world = get_world_size()
    resolved = resolve_ds_config(config, world_size=world, hidden_size=model.hidden_size, geometry=geometry)
    if is_main_process() and run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "ds_config.json").write_text(json.dumps(resolved, indent=2) + "\n")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return start_engine(model, {name: value for name, value in resolved.items() if name not in MONITORS})


def start_engine(model: MultimodalCoconut, ds_config: dict[str, Any]) -> Any:
    """The engine for a DeepSpeed configuration without "auto"; trains the parameters that require gradients."""
    import deepspeed

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("no parameter is left to train")
    os.environ.setdefault("LOCAL_RANK", str(get_local_rank()))  # asked for even where the group was made without
    _gather_once(model, ds_config["zero_optimization"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=ds_config)
    if model.loop.is_leaf:
        model.loop.unhook_decoder()
    model.lockstep = True
    return engine


def _gather_once(model: MultimodalCoconut, zero: dict[str, Any]) -> None:
    """Under ZeRO-3, let the latent loop hold the decoder's weights through all of its passes, where they fit.

    They fit when embedding, decoder and head together are within ``stage3_max_live_parameters``, DeepSpeed's own limit
    of what may be gathered at a time.
    """
    if zero.get("stage") != 3:
        return
    limit = int(zero.get("stage3_max_live_parameters", 1e9))
    size = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.text_parameters)
    if size <= limit:
        model.loop.become_leaf()
        logger.info("ZeRO-3 gathers the decoder once for all passes (%.2g of %.2g live parameters)", size, limit)
    else:
        logger.warning(
            "the text model has %.3g parameters, more than stage3_max_live_parameters %.3g: ZeRO-3 gathers it anew in "
            "each of the K + 1 passes; raise that limit where a rank's memory holds its weights and gradients whole",
            size,
            limit,
        )


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """DeepSpeed wraps the torch optimizer once or twice, depending on ZeRO stage and precision."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def reset_optimizer(engine: Any) -> None:
    """Put the optimizer's moments and step counts back to what they were before the first step.

    In place, since ZeRO keeps references to the tensors for its checkpoints.
    """
    for state in _innermost(engine.optimizer).state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                state[name] = type(value)(0)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the rate of every parameter group for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def gathered_state_dict(engine: Any) -> dict[str, torch.Tensor]:
    """The whole model's weights on rank 0 (empty elsewhere); every rank must call it."""
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict() or {}
    return engine.module.state_dict() if is_main_process() else {}


def is_owned(engine: Any, optimizer: Any) -> bool:
    """Whether `optimizer` is the engine's, at any depth of its wrapping."""
    own = engine.optimizer
    while own is not None:
        if optimizer is own:
            return True
        own = getattr(own, "optimizer", None)
    return False
