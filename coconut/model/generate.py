"""Generation: prompts, padding, settings; the thoughts; then transformers' own decoding.

Shapes: B rows, L columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from coconut.model.loop import gathered, without_zero_hooks
from coconut.model.pass_cache import CACHE_ARGUMENT
from coconut.types import ConfigError, DataError, PromptTemplate
from coconut.utils.distributed import get_world_size

if TYPE_CHECKING:
    from coconut.model.coconut import MultimodalCoconut
    from coconut.model.multipass import ThoughtTransform

#: The documented defaults of `MultimodalCoconut.generate`.
DEFAULTS: dict[str, Any] = {"max_new_tokens": 100, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50}


def generation_settings(
    generation_config: dict[str, Any] | GenerationConfig | None, kwargs: dict[str, Any], eos_token_id: int
) -> GenerationConfig:
    """Merge, in rising order: the documented defaults, `generation_config`, keyword arguments.

    Greedy and beam search take no sampling settings, so those of the defaults are left out unless sampling is on.
    """
    if kwargs.get("return_dict_in_generate"):
        raise ConfigError("generate returns token ids alone; leave return_dict_in_generate out")
    given = generation_config.to_diff_dict() if isinstance(generation_config, GenerationConfig) else generation_config
    chosen = {**(given or {}), **{k: v for k, v in kwargs.items() if hasattr(GenerationConfig(), k)}}
    settings = {**DEFAULTS, **chosen}
    if "max_length" in chosen and "max_new_tokens" not in chosen:
        del settings["max_new_tokens"]
    if not settings["do_sample"]:
        for name in ("temperature", "top_p", "top_k"):
            settings.pop(name)
    settings.setdefault("eos_token_id", eos_token_id)
    settings.setdefault("pad_token_id", eos_token_id)
    return GenerationConfig(**settings)


def left_pad(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's padding to its left, keeping the order of its tokens; drop columns nobody uses."""
    if bool(mask.all()):
        return input_ids, mask
    order = mask.bool().long().sort(dim=1, stable=True).indices
    input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
    first = int(mask.any(0).long().argmax())
    return input_ids[:, first:], mask[:, first:]


def wrap_questions(
    model: MultimodalCoconut,
    input_ids: Tensor,
    mask: Tensor,
    tiles_B: list[int] | None,
    n_latents: int | None,
    wrap: bool | None,
) -> tuple[Tensor, Tensor]:
    """Wrap raw question ids in the training prompt; prompts that hold special tokens pass through.

    Args:
        tiles_B: image tiles of each row; None when that is not known.

    Raises:
        DataError: the model knows no prompt template, or the tiles cannot be told apart by row.
    """
    special = [*model.latent_ids]
    if model.backbone.image_token_id is not None:
        special.append(model.backbone.image_token_id)
    if wrap is None:
        is_raw = not bool(torch.isin(input_ids, torch.tensor(special, device=input_ids.device)).any())
        wrap = is_raw and model.prompt_template is not None and not _has_prefix(input_ids, mask, model.prompt_template)
    if not wrap:
        if n_latents is not None:
            raise DataError(
                f"n_latents = {n_latents} is for questions that generate wraps; a prompt with special tokens has its "
                "thoughts in it, and a model without a prompt template wraps none"
            )
        return input_ids, mask
    if model.prompt_template is None:
        raise DataError(
            "this model has no prompt template (it was not loaded from a checkpoint of the trainer); set "
            "model.prompt_template, or pass whole prompts with their image and latent tokens"
        )
    if tiles_B is None:
        raise DataError(
            f"{input_ids.shape[0]} questions share a flat list of image tiles: say which belong to whom, with "
            "num_patches [batch] or five-dimensional pixel_values"
        )
    spec = model.stage_spec
    if n_latents is None:
        n_latents = spec.n_latents if spec is not None else 0
    elif n_latents < 0:
        raise DataError(f"n_latents is {n_latents}; give 0 or more")
    rows = []
    for row, n_tiles in enumerate(tiles_B):
        question = input_ids[row][mask[row].bool()].tolist()
        # A tokenizer that opens every text (Llama's begin-of-sequence) has opened the question; the template does it.
        if model.prompt_template.prefix and question[:1] == [model.prompt_template.prefix[0]]:
            question = question[1:]
        ids = model.prompt_template.prompt(question, [n_tiles * model.tokens_per_patch] if n_tiles else [])
        if n_latents or (spec is not None and spec.markers):
            ids += [model.start_latent_id, *([model.latent_token_id] * n_latents), model.end_latent_id]
        rows.append(ids)
    length = max(len(ids) for ids in rows)
    device = input_ids.device
    wrapped = torch.tensor([[model.eos_token_id] * (length - len(ids)) + ids for ids in rows], device=device)
    new_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    return wrapped, new_mask


def think_then_decode(
    model: MultimodalCoconut,
    input_ids: Tensor,
    mask: Tensor,
    columns: list[int],
    pixel_values: Tensor | None,
    visual_features: Tensor | None,
    thought_transform: ThoughtTransform | None,
    settings: GenerationConfig,
    extra: dict[str, Any],
) -> Tensor:
    """New token ids [B, T]: the latents once, then transformers' own decoding from the cache.

    Args:
        input_ids, mask: [B, L], padded on the left.
        columns: those that hold a latent in some row.
        extra: transformers' further arguments of `generate`, such as a streamer.
    """
    was_training, held = model.training, model.text_weights_held
    model.eval()
    with gathered(model.text_parameters if held else []):
        visual_features, _, n_calls = model.before_the_loop(input_ids, columns, pixel_values, visual_features)
        # One column more than the passes need, the last, which transformers' decoding takes.
        missing = (n_calls or 1) + len(columns) + 1 - input_ids.shape[1]
        if missing > 0:  # a short batch, where another rank has more thoughts
            input_ids = nn.functional.pad(input_ids, (missing, 0), value=model.eos_token_id)
            mask = nn.functional.pad(mask, (missing, 0), value=0)
            columns = [column + missing for column in columns]
        output = model.run_loop(
            input_ids[:, :-1], mask[:, :-1], columns, visual_features, n_calls, thought_transform=thought_transform
        )
        assert output.cache is not None
        cache = output.cache.to_dynamic(model.backbone.text_config)
        cache.batch_repeat_interleave(max(settings.num_beams or 1, settings.num_return_sequences or 1))
        model.backbone.prepare_decoding(input_ids, mask)
        # A rank that holds the weights stops when its own rows are answered; with partitioned weights all ranks make as
        # many steps as the slowest.
        with without_zero_hooks(model.base_model, when=held):
            ids: Tensor = model.base_model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=settings,
                synced_gpus=model.lockstep and get_world_size() > 1 and not held,
                **{CACHE_ARGUMENT: cache},
                **extra,
            )
    model.train(was_training)
    return ids[:, input_ids.shape[1] :]


def forward_from_cache(
    model: MultimodalCoconut,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    options: dict[str, Any],
) -> Any:
    """transformers' own forward of tokens that continue a cache: its output.

    Args:
        attention_mask: [B, cached + L]; None where no cached token is padding.
        position_ids: [B, L]; by default they go on counting, and skip padding.

    Raises:
        DataError: latents among the new tokens, or a mask of another shape.
        ConfigError: gradients are wanted under ZeRO-3.
    """
    if bool((input_ids == model.latent_token_id).any()):
        raise DataError("past_key_values cannot be given together with latent tokens in input_ids")
    n_rows, n_new = input_ids.shape
    shape = (n_rows, cache.get_seq_length() + n_new)
    if attention_mask is None:
        attention_mask = torch.ones(shape, dtype=torch.long, device=input_ids.device)
    elif attention_mask.shape != shape:
        raise DataError(
            f"attention_mask is {list(attention_mask.shape)}; with past_key_values it covers the {shape[1] - n_new} "
            f"cached tokens and the {n_new} new ones: {list(shape)}"
        )
    if position_ids is None and model.backbone.counts_positions:
        position_ids = model.backbone.position_ids(input_ids, attention_mask)[:, -n_new:]
    held = model.text_weights_held
    if held and torch.is_grad_enabled():
        raise ConfigError("past_key_values are for inference; under ZeRO-3 call forward in torch.no_grad() then")
    with gathered(model.text_parameters if held else []), without_zero_hooks(model.base_model, when=held):
        return model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_ARGUMENT: cache},
            **options,
        )


def _has_prefix(input_ids: Tensor, mask: Tensor, template: PromptTemplate) -> bool:
    """Whether every row begins as a chat prompt does; a prefix of one token (begin of sequence) says nothing."""
    prefix = list(template.prefix)
    rows = (ids[kept.bool()].tolist() for ids, kept in zip(input_ids, mask, strict=True))
    return len(prefix) > 1 and all(row[: len(prefix)] == prefix for row in rows)
