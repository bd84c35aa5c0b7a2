"""The training steps that are compared: each a function without arguments that returns the summed loss of one batch.

ours                    MultimodalCoconut
single_pass             one ordinary pass over the same tokens, latents looked up as any token; loss at labels only
original                `original.OriginalCoconut`
original-logits         the same, logits at label positions only
original-logits-lists   and without the lists
original-logits-lists-states   and without the hidden states of all layers; what then is left is the cache
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.original import OriginalCoconut
from benchmarks.shapes import Shape, build_batch, build_model
from coconut import MultimodalCoconut

#: Taken away from the original one after the other; the last step to ours is the cache.
ABLATION: dict[str, dict[str, Any]] = {
    "original": {},
    "original-logits": {"logits": "labels"},
    "original-logits-lists": {"logits": "labels", "feedback": "column"},
    "original-logits-lists-states": {"logits": "labels", "feedback": "column", "keep_states": False},
}

Step = Callable[[], Tensor]


def build_step(side: str, shape: Shape, device: str, checkpointing: bool) -> tuple[Step, MultimodalCoconut]:
    """The side's forward on its own copy of the model (the same weights for every side), and that copy."""
    model = build_model(shape, device)
    batch = build_batch(shape, device)
    if side == "ours":
        if checkpointing:
            model.gradient_checkpointing_enable()
        return lambda: _ours(model, batch), model
    if side == "single_pass":
        if checkpointing:
            model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        return lambda: _single_pass(model, batch), model
    if checkpointing:
        raise ValueError("the original cannot be checkpointed: transformers' checkpointing drops the cache")
    original = OriginalCoconut(model.base_model, model.latent_token_id, model.eos_token_id, **ABLATION[side])
    return lambda: _original(original, model, batch), model


def _ours(model: MultimodalCoconut, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, loss_only=True, num_items_in_batch=1).loss
    return loss


def _single_pass(model: MultimodalCoconut, batch: dict[str, Tensor]) -> Tensor:
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.base_model.dtype)
    hidden_BLH = model.base_model.base_model(**inputs, use_cache=False).last_hidden_state
    is_label_BM = labels[:, 1:] != -100
    logits_NV = model.base_model.get_output_embeddings()(hidden_BLH[:, :-1][is_label_BM])
    if logits_NV.dtype == torch.bfloat16:
        logits_NV = logits_NV.float()
    return F.cross_entropy(logits_NV, labels[:, 1:][is_label_BM], reduction="sum")


def _original(original: OriginalCoconut, model: MultimodalCoconut, batch: dict[str, Tensor]) -> Tensor:
    input_ids, labels = batch["input_ids"], batch["labels"]
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    embeds_BLH = None
    if "pixel_values" in batch:
        embeds_BLH = original.base_model.get_input_embeddings()(input_ids)
        features = model.encode_images(batch["pixel_values"]).to(embeds_BLH.dtype)
        is_image_BL1 = (input_ids == model.backbone.image_token_id)[..., None]
        embeds_BLH = embeds_BLH.masked_scatter(is_image_BL1, features)
    mean = original(input_ids, batch["attention_mask"], labels, positions, embeds_BLH).loss
    return mean * (labels[:, 1:] != -100).sum()
