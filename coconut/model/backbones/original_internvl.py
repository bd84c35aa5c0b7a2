"""InternVL's original format (`InternVLChatModel`) read into transformers' native class, and written back.

    config.json            llm_config, vision_config            -> InternVLConfig
    vision_model.*         attn.qkv fused, ls1, norm1 ...       -> model.vision_tower.*   (q, k, v apart)
    mlp1.0 mlp1.1 mlp1.3                                        -> model.multi_modal_projector.*
    language_model.*       Qwen2, Qwen3 or Llama                -> model.language_model.*, lm_head.*

No remote code runs; weights are read from safetensors only, one tensor at a time, so that a rank never holds more than
one of them beside its own partition.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration, PreTrainedModel
from transformers.utils import cached_file

from coconut.types import CheckpointError, ConfigError

MODEL_TYPE = "internvl_chat"
CONTEXT_TOKEN = "<IMG_CONTEXT>"
INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"

#: Native name -> original name, in this order.
_VISION = (
    ("model.vision_tower.", "vision_model."),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    ("encoder.layer.", "encoder.layers."),
    ("attention.projection_layer", "attn.proj"),
    ("attention.", "attn."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("lambda_", "ls"),
)
_PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
_VISION_KEYS: tuple[str, ...] = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
)
_VISION_KEYS += ("patch_size", "num_channels", "hidden_act", "layer_norm_eps", "norm_type", "initializer_range")


def convert_config(original: dict[str, Any], image_token_id: int) -> InternVLConfig:
    """The native configuration of an original config.json.

    Raises:
        ConfigError: a language model, or a way of reading the vision tower, that the native class does not have.
    """
    text, vision = dict(original["llm_config"]), original["vision_config"]
    kind = text.pop("model_type", None) or {"Qwen2ForCausalLM": "qwen2"}.get((text.get("architectures") or [""])[0])
    if kind not in ("qwen2", "qwen3", "llama"):
        raise ConfigError(f"the language model of this InternVL is {kind!r}; qwen2, qwen3 and llama can be read")
    if original.get("select_layer", -1) != -1 or original.get("ps_version", "v2") != "v2":
        raise ConfigError("this InternVL has select_layer other than -1 or ps_version other than v2, which none reads")
    image_size = original.get("force_image_size") or vision["image_size"]
    ours = {key: vision[key] for key in _VISION_KEYS if key in vision}
    ours.update(image_size=image_size, attention_bias=vision.get("qkv_bias", True), use_mean_pooling=True)
    ours.update(use_qk_norm=vision.get("qk_normalization", False), use_absolute_position_embeddings=True)
    ratio = original.get("downsample_ratio", 0.5)
    return InternVLConfig(
        vision_config=ours,
        text_config=AutoConfig.for_model(kind, **{**text, "use_cache": True}),
        image_token_id=image_token_id,
        downsample_ratio=ratio,
        image_seq_length=int((image_size // vision["patch_size"] * ratio) ** 2),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def original_name(native: str) -> tuple[str, int | None]:
    """Where a native parameter comes from: the original's name, and which third of it (q, k, v), if not all."""
    if native.startswith("lm_head."):
        return f"language_model.{native}", None
    if native.startswith("model.language_model."):
        return native.replace("model.language_model.", "language_model.model.", 1), None
    if native.startswith("model.multi_modal_projector."):
        layer, kind = native.removeprefix("model.multi_modal_projector.").split(".")
        return f"{_PROJECTOR[layer]}.{kind}", None
    name = native
    for ours, theirs in _VISION:
        name = name.replace(ours, theirs)
    if match := re.search(r"attn\.([qkv])_proj", name):
        return name.replace(match[0], "attn.qkv"), "qkv".index(match[1])
    return name.replace("attn.qk_norm", "attn"), None


def shards_of(model_id: str) -> dict[str, str]:
    """Original key -> path of the safetensors file that holds it.

    Raises:
        CheckpointError: no safetensors; pickled weights are not read, as they can run code.
    """
    missing_ok = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(model_id, INDEX_FILE, **missing_ok)
    if index is not None:
        names: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        paths = {file: str(cached_file(model_id, file)) for file in sorted(set(names.values()))}
        return {key: paths[file] for key, file in names.items()}
    whole = cached_file(model_id, WEIGHTS_FILE, **missing_ok)
    if whole is None:
        raise CheckpointError(
            f"{model_id!r} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; pickled weights (.bin, .pt) are not read, as "
            "they can run code: convert them to safetensors first"
        )
    with safe_open(whole, framework="pt") as file:
        return dict.fromkeys(file.keys(), whole)


def load_original(
    model_id: str, original: dict[str, Any], image_token_id: int, options: dict[str, Any]
) -> PreTrainedModel:
    """A native InternVL with the original's weights; partitioned while ZeRO-3's `HfDeepSpeedConfig` is alive.

    Args:
        original: content of its config.json.
        options: ``dtype`` ("auto" keeps the checkpoint's) and perhaps ``attn_implementation``.

    Raises:
        CheckpointError: a weight is missing, left over, or of another shape.
    """
    options = dict(options)
    if options["dtype"] == "auto":
        options["dtype"] = getattr(torch, original.get("torch_dtype") or original.get("dtype") or "float32")
    _hand_back_freed_memory()
    model = InternVLForConditionalGeneration._from_config(convert_config(original, image_token_id), **options)
    shards, wanted = shards_of(model_id), defaultdict(list)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    for name in parameters:
        key, part = original_name(name)
        if key not in shards:
            raise CheckpointError(f"{model_id!r} lacks {key}, which {name} is read from")
        wanted[shards[key]].append((name, key, part))
    used = {key for entries in wanted.values() for _, key, _ in entries}
    if left := sorted(set(shards) - used - ({"language_model.lm_head.weight"} if tied else set())):
        raise CheckpointError(f"{model_id!r} holds {len(left)} weights without a place here, such as {left[0]}")
    for path, entries in wanted.items():
        with safe_open(path, framework="pt") as file:
            for name, key, part in entries:
                _fill(parameters[name], file.get_slice(key), part, key)
    return model


def _hand_back_freed_memory() -> None:
    """Let glibc give tensors of a megabyte and more back to the system when they are freed.

    It raises that limit by itself, up to 32 MB, and would keep several shard files of weights that have gone into
    their partitions long since.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system's C library has no such setting
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1_000_000)


#: <malloc.h>
_M_MMAP_THRESHOLD = -3


def _fill(parameter: Tensor, source: Any, part: int | None, key: str) -> None:
    rows = source.get_shape()[0] // 3 if part is not None else 0
    value = source[:] if part is None else source[part * rows : (part + 1) * rows]
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if tuple(value.shape) != shape:
        raise CheckpointError(f"{key} has shape {tuple(value.shape)}, but config.json asks for {shape}")
    with _whole(parameter), torch.no_grad():
        if parameter.numel():  # under ZeRO-3 all ranks hold it here, and rank 0's values count
            parameter.copy_(value)


def _whole(parameter: Tensor) -> Any:
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0)


def export_original(
    state_dict: dict[str, Tensor], original: dict[str, Any], folder: Path, max_shard_size: str = "5GB"
) -> None:
    """Write native weights back in the original format: the same keys, shapes and dtypes.

    Args:
        state_dict: whole weights under the native class's names.
        original: content of the original config.json; only the vocabulary's size is brought up to date.
    """
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, weight in state_dict.items():
        key, part = original_name(name)
        parts[key][part or 0] = weight
    weights = {key: torch.cat([p[i] for i in range(len(p))]) if len(p) > 1 else p[0] for key, p in parts.items()}
    table, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    if head in weights and weights[head].data_ptr() == weights[table].data_ptr():
        del weights[head]  # tied; the writer would keep one of the two, and not the table
    rows = weights[table].shape[0]
    config = {**original, "llm_config": {**original["llm_config"], "vocab_size": rows}}
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
