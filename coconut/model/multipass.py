"""The latent loop: a causal decoder run over the columns of a batch in several passes.

    embeddings [B, L, H] --cut at every latent column--> pass 0, 1, ..., K --concatenate--> hidden [B, L, H]
                                                            |  ^
                       last hidden state of the column before  |  becomes the latent's input embedding
                                                            keys and values of earlier passes, as parts

Gradients flow through the thoughts and through the keys and values (arXiv 2412.06769, section 3). Nothing is
written in place, and no loop runs over rows or tokens.

Shapes: B rows, L columns, H hidden size, K latent columns, q columns of one pass, p columns before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

#: Replaces a thought before it is fed back: (thought [B, 1, H], index of the latent column) -> [B, 1, H].
ThoughtTransform = Callable[[Tensor, int], Tensor]

Part = tuple[Tensor, Tensor]  # keys and values [B, kv_heads, q, head_dim] of one pass


class _PartLayer(DynamicLayer):
    """One decoder layer's keys and values as seen from one pass.

    The parts of all passes are shared between the views; the concatenation is made when attention asks for it and
    kept by nobody. `update` may be called twice for the same pass, since activation checkpointing runs the layer
    again in the backward: the second call reads the same earlier parts and appends nothing.
    """

    def __init__(self, parts: list[Part], pass_index: int) -> None:
        super().__init__()
        self.parts = parts
        self.pass_index = pass_index
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Part:
        earlier = self.parts[: self.pass_index]
        if len(self.parts) == self.pass_index:
            self.parts.append((key_states, value_states))
        if not earlier:
            return key_states, value_states
        keys = torch.cat([*(part[0] for part in earlier), key_states], dim=-2)
        values = torch.cat([*(part[1] for part in earlier), value_states], dim=-2)
        return keys, values

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.parts[: self.pass_index])


class PassCache:
    """Keys and values of all passes, layer by layer, as the parts in which they were computed."""

    def __init__(self, n_layers: int) -> None:
        self.parts: list[list[Part]] = [[] for _ in range(n_layers)]

    def view(self, pass_index: int) -> Cache:
        """The cache that the decoder is given in pass `pass_index`."""
        return Cache(layers=[_PartLayer(parts, pass_index) for parts in self.parts])

    def to_dynamic(self, config: object) -> DynamicCache:
        """An ordinary transformers cache with the same content."""
        cache = DynamicCache(config=config)
        for layer, parts in enumerate(self.parts):
            cache.update(torch.cat([k for k, _ in parts], dim=-2), torch.cat([v for _, v in parts], dim=-2), layer)
        return cache


@dataclass
class PassOutput:
    """What the loop returns; sequences at full length, as if the decoder had run once."""

    hidden_BLH: Tensor  # after the final norm
    thoughts: list[Tensor] = field(default_factory=list)  # [B, 1, H] each, one a latent column
    cache: PassCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # per layer [B, L, H]
    attentions: tuple[Tensor, ...] | None = None  # per layer [B, heads, L, L]


def run_passes(
    decoder: Any,
    embeds_BLH: Tensor,
    attention_mask_BL: Tensor,
    position_ids: Tensor,
    segments: Sequence[tuple[int, int]],
    is_latent_BL: Tensor,
    *,
    latent_columns: Sequence[int] = (),
    thought_transform: ThoughtTransform | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> PassOutput:
    """Run `decoder` over `segments` of the columns, feeding hidden states back at the latents.

    Args:
        decoder: a transformers decoder without head; returns ``last_hidden_state`` after its final norm.
        embeds_BLH: input embeddings; those at latent positions are ignored.
        attention_mask_BL: 1 for tokens, 0 for padding.
        position_ids: [B, L], or [axes, B, L] for multi-axis rotary embeddings.
        segments: consecutive [start, end) column ranges (`spans.cut_into_passes`).
        is_latent_BL: which positions are latents.
        latent_columns: the segment starts at which hidden states are fed back.
        thought_transform: replaces the thoughts; for experiments on what they carry.
    """
    cache = PassCache(decoder.config.num_hidden_layers)
    latent_index = {column: k for k, column in enumerate(latent_columns)}
    hidden: list[Tensor] = []
    thoughts: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    attentions: list[tuple[Tensor, ...]] = []
    for pass_index, (start, end) in enumerate(segments):
        embeds_BqH = embeds_BLH[:, start:end]
        if start in latent_index:
            thought_B1H = hidden[-1][:, -1:]
            if thought_transform is not None:
                thought_B1H = thought_transform(thought_B1H, latent_index[start])
            thoughts.append(thought_B1H)
            first_B1H = torch.where(is_latent_BL[:, start, None, None], thought_B1H, embeds_BqH[:, :1])
            embeds_BqH = torch.cat([first_B1H, embeds_BqH[:, 1:]], dim=1)
        out = decoder(
            inputs_embeds=embeds_BqH,
            attention_mask=attention_mask_BL[:, :end],
            position_ids=position_ids[..., start:end],
            past_key_values=cache.view(pass_index),
            use_cache=True,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden.append(out.last_hidden_state)
        if output_hidden_states:
            states.append(out.hidden_states)
        if output_attentions:
            attentions.append(out.attentions)
    return PassOutput(
        hidden_BLH=torch.cat(hidden, dim=1),
        thoughts=thoughts,
        cache=cache,
        hidden_states=_join_columns(states) if output_hidden_states else None,
        attentions=_join_attentions(attentions, embeds_BLH.shape[1]) if output_attentions else None,
    )


def _join_columns(states: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(per_pass, dim=1) for per_pass in zip(*states, strict=True))


def _join_attentions(attentions: list[tuple[Tensor, ...]], length: int) -> tuple[Tensor, ...]:
    """Queries of a pass attend to the columns up to its end; later columns get weight zero."""

    def widen(weights_BhqK: Tensor) -> Tensor:
        return nn.functional.pad(weights_BhqK, (0, length - weights_BhqK.shape[-1]))

    return tuple(torch.cat([widen(w) for w in per_pass], dim=2) for per_pass in zip(*attentions, strict=True))


class _CheckpointedLayer:
    """Mixed into a layer's class: runs the layer under activation checkpointing.

    transformers' own gradient checkpointing drops the cache with no more than a warning, which gives a wrong loss
    here. Non-reentrant, because a reentrant checkpoint reduces a gradient more than once under ZeRO; around the whole
    ``__call__``, so that ZeRO-3's hooks gather the layer's weights for the recomputation as well.
    """

    def __call__(self, *args: object, **kwargs: object) -> object:
        if torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)  # type: ignore[call-overload, misc]
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


def checkpoint_layers(layers: nn.ModuleList) -> None:
    """Make every layer of the list recompute its activations in the backward. Idempotent."""
    for layer in layers:
        kind = type(layer)
        if not issubclass(kind, _CheckpointedLayer):
            layer.__class__ = type(f"Checkpointed{kind.__name__}", (_CheckpointedLayer, kind), {})
