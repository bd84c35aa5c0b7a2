"""Checkpoints of the original implementation of Coconut (facebookresearch/coconut), read as ours.

    checkpoint_N   torch state dict: base_causallm.* and embedding.weight, or (cot, no_cot) bare names
    + the folder of the model it started from (config, tokenizer)
        -> MultimodalCoconut and its tokenizer, the three tokens in the original's order

The original adds its tokens as start, end, latent; ours are otherwise start, latent, end. Ids must be the checkpoint's.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from coconut.model.coconut import MultimodalCoconut
from coconut.types import (
    END_LATENT_TOKEN,
    LATENT_TOKEN,
    START_LATENT_TOKEN,
    CheckpointError,
    ConfigError,
    PromptTemplate,
    StageSpec,
)
from coconut.utils.tokenizer import special_token_ids

ORIGINAL_ORDER = (START_LATENT_TOKEN, END_LATENT_TOKEN, LATENT_TOKEN)
_PREFIX = "base_causallm."


def load_original(
    path: Path, base: str | Path, spec: StageSpec, template: PromptTemplate | None = None
) -> tuple[MultimodalCoconut, Any]:
    """Load a checkpoint file of the original.

    Args:
        path: the file that it wrote, `checkpoint_N`.
        base: folder or hub id of the model it started from: gives configuration and tokenizer, no weights.
        spec: the stage that the checkpoint was trained at, which the file does not say.
        template: of prompts; None is the original's own, the question and a line break.

    Returns:
        the model, and the tokenizer to save with it.

    Raises:
        CheckpointError: the file is no such checkpoint, or does not fit the base model.
        ConfigError: the base model's folder cannot be used.
    """
    weights = _read(path)
    tokenizer = _tokenizer(base)
    try:
        config = AutoConfig.from_pretrained(str(base))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(base)!r} has no readable config.json: {error}") from error
    model = AutoModelForCausalLM.from_config(config)
    rows = next((len(w) for name, w in weights.items() if name.endswith(("wte.weight", "embed_tokens.weight"))), None)
    if rows is None:
        raise CheckpointError(f"{path} holds no embeddings (wte or embed_tokens) of a causal language model")
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows)
    if rows < len(tokenizer) and spec.markers:
        raise CheckpointError(
            f"{path} has {rows} embeddings and the tokenizer of {str(base)!r} with the latent tokens {len(tokenizer)}; "
            "is it the model that the checkpoint started from, and one trained with thoughts?"
        )
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # sizes differ
        raise CheckpointError(f"{path} does not fit {str(base)!r}: {error}") from error
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    buffers = {name for name, _ in model.named_buffers()}
    missing = sorted(set(missing) - tied - buffers)
    # Attention masks that older transformers kept as buffers are no weights.
    unexpected = sorted(name for name in unexpected if not name.endswith((".attn.bias", ".attn.masked_bias")))
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit {str(base)!r}: {len(missing)} weights are missing (first: {missing[:1]}), "
            f"{len(unexpected)} unknown (first: {unexpected[:1]})"
        )
    model.tie_weights()
    model.to(next(iter(weights.values())).dtype)
    start, latent, end = special_token_ids(tokenizer)
    found = MultimodalCoconut(model, latent, start, end, tokenizer.eos_token_id)
    line_break = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"])
    found.prompt_template = template or PromptTemplate(prefix=_automatic_prefix(tokenizer), suffix=line_break)
    found.stage_spec = spec
    found.metadata = {"imported_from": f"the original Coconut, {path.name}"}
    return found.eval(), tokenizer


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a torch checkpoint: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is no state dict: it must map names to tensors, as the original saves it")
    with_prefix = {name.removeprefix(_PREFIX): w for name, w in content.items() if name.startswith(_PREFIX)}
    # embedding.weight is the input embeddings once more.
    return with_prefix or {name: w for name, w in content.items() if name != "embedding.weight"}


def _tokenizer(base: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"no tokenizer can be loaded from {str(base)!r}: {error}") from error
    for token in ORIGINAL_ORDER:
        if token not in tokenizer.get_vocab():
            tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _automatic_prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself, which the original's questions have too."""
    bare, dressed = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return tuple(dressed[: len(dressed) - len(bare)]) if dressed[len(dressed) - len(bare) :] == bare else ()
