"""The latent loop: a causal decoder run over the columns of a batch in several passes.

    embeddings [B, L, H] --cut at every latent column--> pass 0, 1, ..., K --concatenate--> hidden [B, L, H]
                                                            |  ^
                       last hidden state of the column before  |  becomes the latent's input embedding
                                                            keys and values of earlier passes

Gradients flow through the thoughts and through the keys and values (arXiv 2412.06769, section 3). No value is ever
overwritten, and no loop runs over rows or tokens.

Shapes: B rows, L columns, H hidden size, K latent columns, q columns of one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coconut.model.pass_cache import CACHE_ARGUMENT, PassCache
from coconut.model.spans import Segment

#: Replaces a thought before it is fed back: (thought [B, 1, H], index of the latent column) -> [B, 1, H].
ThoughtTransform = Callable[[Tensor, int], Tensor]

#: Makes the embeddings that are fed back of hidden states, column by column: [B, q, H] -> [B, q, H].
Feedback = Callable[[Tensor], Tensor]


@dataclass
class PassOutput:
    """What the loop returns; sequences at full length, as if the decoder had run once."""

    hidden_BLH: Tensor  # after the final norm
    thoughts_BKH: Tensor  # what was fed back, one column a latent column
    cache: PassCache | None  # None where no later pass and no caller needs it
    hidden_states: tuple[Tensor, ...] = ()  # per layer [B, L, H]
    attentions: tuple[Tensor, ...] = ()  # per layer [B, heads, L, L]


def run_passes(
    decoder: Callable[..., Any],
    embeds_BLH: Tensor,
    attention_mask_BL: Tensor,
    position_ids: Tensor,
    segments: Sequence[Segment],
    is_latent_BL: Tensor,
    cache: PassCache | None,
    *,
    feedback: Feedback | None = None,
    thought_transform: ThoughtTransform | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> PassOutput:
    """Run `decoder` over `segments` of the columns, feeding hidden states back at the latents.

    Args:
        decoder: a transformers decoder without head; returns ``last_hidden_state`` after its final norm.
        embeds_BLH: input embeddings; at latent positions they are used only as the first guess of latents that are
            computed together (`Segment.iterations`).
        attention_mask_BL: 1 for tokens, 0 for padding.
        position_ids: [B, L], or [axes, B, L] for multi-axis rotary embeddings.
        segments: from `spans.cut_into_passes`.
        is_latent_BL: which positions are latents.
        cache: an empty one; holds the keys and values of all columns afterwards. May be None for a single segment.
        feedback: maps the hidden states [B, q, H] to the embeddings that continue them; None feeds them back as they
            are (the paper).
        thought_transform: replaces the thoughts; for experiments on what they carry.
    """
    hidden: list[Tensor] = []
    thoughts: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    attentions: list[tuple[Tensor, ...]] = []

    def call(embeds_BqH: Tensor, start: int, index: int, keep: bool, **options: bool) -> Any:
        end = start + embeds_BqH.shape[1]
        return decoder(
            inputs_embeds=embeds_BqH,
            attention_mask=attention_mask_BL[:, :end],
            position_ids=position_ids[..., start:end],
            use_cache=cache is not None,
            **({} if cache is None else {CACHE_ARGUMENT: cache.view(index, keep)}),
            **options,
        )

    def fed_back(hidden_BqH: Tensor) -> Tensor:
        """The embeddings of the next latents, given the hidden states of the columns before them."""
        thought_BqH = hidden_BqH if feedback is None else feedback(hidden_BqH)
        if thought_transform is None or not segment.n_latents:
            return thought_BqH
        first = sum(thought.shape[1] for thought in thoughts)
        columns = [thought_transform(thought_BqH[:, i : i + 1], first + i) for i in range(thought_BqH.shape[1])]
        return torch.cat(columns, dim=1)

    for index, segment in enumerate(segments):
        embeds_BqH = embeds_BLH[:, segment.start : segment.end]
        if index:  # at a cut without a latent too, so that all ranks call the feedback equally often
            n = max(segment.n_latents, 1)
            is_latent_Bn1 = is_latent_BL[:, segment.start : segment.start + n, None]
            before_B1H = hidden[-1][:, -1:]
            latents_BnH = torch.where(is_latent_Bn1[:, :1], fed_back(before_B1H), embeds_BqH[:, :1])
            if n > 1:  # the first guess of all but the first is the latent token's own embedding
                latents_BnH = torch.cat([latents_BnH, embeds_BqH[:, 1:n]], dim=1)
            if segment.window is not None:
                first_Bn, last_Bn = (updates_Bn.to(latents_BnH.device) for updates_Bn in segment.window)
            for update in range(1, segment.calls):
                out = call(latents_BnH, segment.start, index, keep=False)
                next_BnH = fed_back(torch.cat([before_B1H, out.last_hidden_state[:, :-1]], dim=1))
                is_due_Bn = (first_Bn <= update) & (update <= last_Bn)
                latents_BnH = torch.where(is_due_Bn[..., None], next_BnH, latents_BnH)
            if segment.n_latents:
                thoughts.append(latents_BnH)
            embeds_BqH = torch.cat([latents_BnH, embeds_BqH[:, n:]], dim=1)
        out = call(
            embeds_BqH,
            segment.start,
            index,
            keep=True,
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
        thoughts_BKH=torch.cat(thoughts, dim=1) if thoughts else embeds_BLH[:, :0],
        cache=cache,
        hidden_states=_join_columns(states) if output_hidden_states else (),
        attentions=_join_attentions(attentions, embeds_BLH.shape[1]) if output_attentions else (),
    )


def _join_columns(states: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(per_pass, dim=1) for per_pass in zip(*states, strict=True))


def _join_attentions(attentions: list[tuple[Tensor, ...]], length: int) -> tuple[Tensor, ...]:
    """Queries of a pass attend to the columns up to its end; later columns get weight zero."""

    def widen(weights_BhqK: Tensor) -> Tensor:
        return nn.functional.pad(weights_BhqK, (0, length - weights_BhqK.shape[-1]))

    return tuple(torch.cat([widen(w) for w in per_pass], dim=2) for per_pass in zip(*attentions, strict=True))
