"""Arithmetic of a run, counted from the model's configuration and the number of tokens.

What is counted, a multiply and its add as two operations:

    decoder    every position once: text, image and latent tokens alike. The latent loop keeps its keys and values, so
               K latent passes compute K positions and nothing twice: a thought costs what any other token costs.
    attention  scores and their weighted sum over the pairs that the causal mask leaves, T (T + 1) / 2 a sequence
    head       only where logits are asked for (label positions in training, generated tokens in generation)
    vision     each patch (tile) once: patch embedding, encoder layers with full attention, pixel shuffle, projector

Norms, activations, softmax and embedding look-ups are left out (below 1 % of any model worth counting), and so is
padding: this is the work that the data asks for, not what a batch wastes. A backward pass costs two forward passes;
gradient checkpointing adds one forward pass.
"""

from __future__ import annotations

from typing import Any

#: Decoders whose MLP is two matrices; all others known here have a gate as a third.
_UNGATED_MODEL_TYPES = frozenset({"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "phi", "starcoder2"})


def forward_flops(
    model_config: Any,
    n_tokens: int,
    n_patches: int = 0,
    *,
    n_samples: int = 1,
    n_logit_tokens: int | None = None,
) -> int:
    """Operations of one forward pass over a set of samples.

    Args:
        model_config: transformers configuration of the whole model (with ``text_config`` and ``vision_config``), or of
            a text-only causal model.
        n_tokens: decoder positions over all samples that are not padding, image and latent tokens included.
        n_patches: image tiles over all samples.
        n_samples: sequences that the tokens are shared by; attention takes them as equally long, which is exact for
            equal lengths and otherwise counts the attention slightly low.
        n_logit_tokens: positions whose logits are computed; None means all.
    """
    text = getattr(model_config, "text_config", None) or model_config
    mean_length = n_tokens / max(n_samples, 1)
    n_pairs = round(n_tokens * (mean_length + 1) / 2)
    n_logits = n_tokens if n_logit_tokens is None else n_logit_tokens
    total = decoder_flops_per_token(text) * n_tokens + attention_flops_per_pair(text) * n_pairs
    total += 2 * text.hidden_size * text.vocab_size * n_logits
    if n_patches:
        total += patch_flops(model_config) * n_patches
    return int(total)


def training_flops(
    model_config: Any,
    n_tokens: int,
    n_patches: int = 0,
    *,
    n_samples: int = 1,
    n_logit_tokens: int | None = None,
    recompute: bool = False,
) -> int:
    """Operations of forward and backward; arguments of :func:`forward_flops`.

    Args:
        recompute: gradient checkpointing is on, so the backward pass runs the forward pass again.
    """
    forward = forward_flops(model_config, n_tokens, n_patches, n_samples=n_samples, n_logit_tokens=n_logit_tokens)
    return forward * (4 if recompute else 3)


def generation_flops(model_config: Any, n_prompt_tokens: int, n_generated: int, n_patches: int = 0) -> int:
    """Operations to answer one prompt with a key/value cache; its latent span belongs to the prompt.

    The last generated token is never read back, and the prompt needs logits at its last position only.
    """
    n_tokens = n_prompt_tokens + max(n_generated - 1, 0)
    return forward_flops(model_config, n_tokens, n_patches, n_logit_tokens=n_generated)


def decoder_flops_per_token(text_config: Any) -> int:
    """Matrix products of all decoder layers for one position: twice their weights, attention's pairs not included."""
    hidden = text_config.hidden_size
    n_heads, head_width = _heads(text_config)
    n_kv_heads = getattr(text_config, "num_key_value_heads", None) or n_heads
    mlp_width = getattr(text_config, "intermediate_size", None) or getattr(text_config, "n_inner", None) or 4 * hidden
    n_mlp_matrices = 2 if text_config.model_type in _UNGATED_MODEL_TYPES else 3
    attention = 2 * hidden * n_heads * head_width + 2 * hidden * n_kv_heads * head_width
    return int(2 * text_config.num_hidden_layers * (attention + n_mlp_matrices * hidden * mlp_width))


def attention_flops_per_pair(text_config: Any) -> int:
    """Score and weighted sum of one (query, key) pair in all heads and layers."""
    n_heads, head_width = _heads(text_config)
    return 4 * int(text_config.num_hidden_layers) * n_heads * head_width


def patch_flops(model_config: Any) -> int:
    """Vision tower, pixel shuffle and projector for one image tile of the configured size."""
    vision = model_config.vision_config
    hidden = vision.hidden_size
    (height, width), (patch_height, patch_width) = _pair(vision.image_size), _pair(vision.patch_size)
    n_cells = (height // patch_height) * (width // patch_width)
    n_positions = n_cells + 1  # and the class token
    embedding = 2 * n_cells * vision.num_channels * patch_height * patch_width * hidden
    layer = 2 * n_positions * (4 * hidden * hidden + 2 * hidden * vision.intermediate_size)
    layer += 4 * n_positions * n_positions * hidden  # every position attends to every other
    shuffle = model_config.downsample_ratio
    text_hidden = model_config.text_config.hidden_size
    n_image_tokens = round(n_cells * shuffle * shuffle)
    projector = 2 * n_image_tokens * (round(hidden / (shuffle * shuffle)) * text_hidden + text_hidden * text_hidden)
    return int(embedding + vision.num_hidden_layers * layer + projector)


def _heads(text_config: Any) -> tuple[int, int]:
    n_heads = int(text_config.num_attention_heads)
    return n_heads, int(getattr(text_config, "head_dim", None) or text_config.hidden_size // n_heads)


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)
