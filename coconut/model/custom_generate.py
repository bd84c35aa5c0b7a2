"""Thinks in latent space, then answers: `generate` for a model that was trained with multimodal CoCoNuT.

Saved beside the weights as ``custom_generate/generate.py``, where transformers finds it; needs only transformers:

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)   # or ...ForCausalLM
    model.generate(input_ids=..., attention_mask=..., pixel_values=..., max_new_tokens=32)

`input_ids` are whole prompts, with image tokens and the latent span, padded on the left. Every latent's input embedding
is the last hidden state of the token before it (arXiv 2412.06769, section 3).
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
from transformers import DynamicCache


@torch.no_grad()
def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """As `model.generate`; returns prompts and answers [B, L + T], as transformers does.

    Args:
        model: the transformers model.
        input_ids: [B, L].
        attention_mask: [B, L], 1 for tokens.
        pixel_values: [patches, 3, height, width], normalised, in the order of their image tokens.
        kwargs: whatever `generate` takes.
    """
    config = model.config
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    embeds = model.get_input_embeddings()(input_ids)
    if pixel_values is not None:
        features = model.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        is_image = (input_ids == config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_image, features.to(embeds.dtype))
    is_latent = input_ids == config.latent_token_id
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    decoder = model.get_decoder()
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    # The last column is left to transformers' own decoding, which needs one to begin with.
    bounds = [0, *is_latent[:, :-1].any(0).nonzero().flatten().tolist(), input_ids.shape[1] - 1]
    hidden = None
    for start, end in pairwise(bounds):
        piece = embeds[:, start:end]
        if hidden is not None:
            thought = hidden[:, -1:]
            if config.latent_embedding_norm is not None:  # thoughts at the norm of an ordinary embedding
                wide = thought.float()
                thought = (wide * config.latent_embedding_norm / wide.norm(dim=-1, keepdim=True)).to(thought.dtype)
            first = torch.where(is_latent[:, start, None, None], thought, piece[:, :1])
            piece = torch.cat([first, piece[:, 1:]], dim=1)
        output = decoder(
            inputs_embeds=piece,
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            use_cache=True,
            **{name: cache},
        )
        hidden = output.last_hidden_state
    cache.batch_repeat_interleave(max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1))
    # Of the class: on the instance, transformers has put this very function in its place.
    return type(model).generate(model, input_ids=input_ids, attention_mask=mask, **{name: cache}, **kwargs)
