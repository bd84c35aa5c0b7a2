"""A DeepSpeed configuration with every "auto" replaced from ours. Pure: dictionaries in, dictionaries out.

The Hugging Face Trainer resolves "auto" for its users; a native DeepSpeed loop has to do it itself, and a value that
says one thing here and another there must fail before any weight is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coconut.config.ds_faults import deepspeed_faults
from coconut.types import ConfigError

AUTO = "auto"
#: Sections of DeepSpeed's monitors; the trainer writes to them itself (`coconut.training.monitors`).
MONITORS = ("tensorboard", "csv_monitor", "comet")
_SECTIONS = ("zero_optimization", "bf16", "fp16", "optimizer", "optimizer.params")  # that we read or write ourselves


@dataclass(frozen=True)
class BatchGeometry:
    """How one optimizer step is cut over ranks and time."""

    samples: int  # samples of one optimizer step, over all ranks
    slots: int  # micro-batches of one optimizer step, over all ranks
    accumulation: int  # micro-batches of one optimizer step on one rank; the last may be no slot
    micro_batch: int  # samples of one micro-batch, rounded up

    def over(self, world_size: int) -> BatchGeometry:
        """The same samples and slots on another number of ranks."""
        return replace(self, accumulation=math.ceil(self.slots / world_size))


def batch_geometry(config: Any, world_size: int) -> BatchGeometry:
    """Samples, slots and accumulation steps for `world_size` ranks.

    With ``global_batch_size`` the samples of a step do not depend on the number of ranks, and
    ``batch_size_training`` is the largest micro-batch; without it, a step takes
    ``batch_size_training * gradient_accumulation_steps`` samples on each rank.
    """
    if config.global_batch_size is None:
        accumulation = config.gradient_accumulation_steps
        samples = config.batch_size_training * accumulation * world_size
    else:
        samples = config.global_batch_size
        accumulation = math.ceil(samples / (config.batch_size_training * world_size))
    slots = accumulation * world_size
    return BatchGeometry(samples, slots, accumulation, math.ceil(samples / slots))


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Parse a DeepSpeed JSON file.

    Raises:
        ConfigError: no such file, or not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in Path("ds_configs").glob("*.json"))
        raise ConfigError(
            f"DeepSpeed configuration {str(path)!r} does not exist; there are {', '.join(known) or 'none'}"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be a DeepSpeed configuration") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; a DeepSpeed configuration is a JSON object")
    return content


def zero_stage(path: str | Path) -> int:
    """ZeRO stage that a DeepSpeed file asks for, 0 when it asks for none."""
    content = read_ds_config(path)
    for section in _SECTIONS:
        value = _get(content, section, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {section} is {value!r}; it has to be a JSON object")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage is {stage!r}; choose 0, 1, 2 or 3")
    return int(stage)


def resolve_ds_config(
    config: Any, *, world_size: int, hidden_size: int, geometry: BatchGeometry | None = None
) -> dict[str, Any]:
    """The DeepSpeed configuration of this run, with no "auto" left.

    Args:
        config: the run configuration; ``config.deepspeed`` names the file (None: ZeRO stage 0, the rest default).
        world_size: number of ranks.
        hidden_size: width of the decoder; sizes ZeRO-3's buckets where they are "auto".
        geometry: how a resumed run's steps were cut at its first start; None: as the configuration says.

    Raises:
        ConfigError: every contradiction between the two files, every "auto" without a meaning, and what DeepSpeed does
            not know or take, in one message.
    """
    path = config.deepspeed
    resolved: dict[str, Any] = read_ds_config(path) if path else {}
    if path:
        zero_stage(path)
    resolved.setdefault("zero_optimization", {"stage": 0})
    geometry = geometry or batch_geometry(config, world_size)
    whole = geometry.micro_batch * geometry.accumulation * world_size
    ours: dict[str, tuple[Any, str]] = {
        "train_batch_size": (whole, "batch_size_training / global_batch_size"),
        "train_micro_batch_size_per_gpu": (geometry.micro_batch, "batch_size_training"),
        "gradient_accumulation_steps": (geometry.accumulation, "gradient_accumulation_steps / global_batch_size"),
        # DeepSpeed clips at 1.0 when the key is missing, so it is always set.
        "gradient_clipping": (config.max_grad_norm, "max_grad_norm"),
        "bf16.enabled": (config.bf16, "bf16"),
        "fp16.enabled": (config.fp16, "fp16"),
        "optimizer.params.lr": (config.learning_rate, "learning_rate"),
        "optimizer.params.weight_decay": (config.weight_decay, "weight_decay"),
    }
    if config.tensorboard:
        ours["tensorboard.enabled"] = (True, "tensorboard")
    sizes = {
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    faults = []
    if "scheduler" in resolved:
        faults.append("it has a scheduler block; the trainer sets the learning rate (learning_rate, warmup_steps)")
    if "optimizer" not in resolved:
        resolved["optimizer"] = {"type": "AdamW", "params": {"lr": AUTO, "weight_decay": AUTO, "torch_adam": True}}
    for key, (value, name) in ours.items():
        current = _get(resolved, key)
        if current in (None, AUTO):
            _set(resolved, key, value)
        elif current != value:
            faults.append(
                f'{key} is {current!r}, but {name} asks for {value!r}; write "auto" there, or make them agree'
            )
    for key, size in sizes.items():
        if _get(resolved, key) == AUTO:
            _set(resolved, key, size)
    faults += _monitor_faults(resolved, config)
    autos = [f'{key} is "auto", which has no meaning here; write a value' for key in _autos(resolved)]
    faults += autos
    if path and not autos:  # else DeepSpeed would find fault with them too, in words of its own
        faults += deepspeed_faults(resolved)
    if faults:
        raise ConfigError(f"{path} cannot be used with this run configuration:\n  - " + "\n  - ".join(faults))
    return resolved


def _monitor_faults(resolved: dict[str, Any], config: Any) -> Iterator[str]:
    """Puts TensorBoard's events into the run folder, where the file names no other; yields what would go wrong."""
    if _get(resolved, "wandb.enabled"):
        yield (
            "wandb.enabled is true: DeepSpeed and the trainer would both write to one wandb run; leave the section out "
            "and set use_wandb: true"
        )
    if _get(resolved, "tensorboard.enabled"):
        if importlib.util.find_spec("tensorboard") is None:
            yield "tensorboard is asked for, but not installed: pip install tensorboard"
        if not _get(resolved, "tensorboard.output_path"):
            _set(resolved, "tensorboard.output_path", str(config.run_dir))
            resolved["tensorboard"].setdefault("job_name", "tensorboard")


def _get(tree: dict[str, Any], key: str, default: Any = None) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return default
        tree = tree[name]
    return tree


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _autos(tree: dict[str, Any] | list[Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, (dict, list)):
            yield from _autos(value, f"{prefix}{name}.")
        elif value == AUTO:
            yield f"{prefix}{name}"
