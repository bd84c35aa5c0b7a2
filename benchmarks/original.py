"""The original Coconut algorithm (arXiv 2412.06769), written anew to be measured against.

Written from the paper and from the behaviour of facebookresearch/coconut (`coconut.py`); no line is copied. What costs
time or memory there is reproduced, each point being a constructor argument so that it can be taken away on its own:

    logits="all"            every pass runs the whole language model with its head over all columns of its segment; the
                            logits of all passes are concatenated to [B, L, V], shifted by a contiguous copy, and the
                            loss is the mean cross-entropy over all of them, but labels of -100, in the model's dtype
    feedback="lists"        after every latent pass a Python list of lists holds one [H] view of the embeddings for each
                            row and column; thoughts replace entries; two levels of torch.stack make [B, L, H] again
    keep_states=True        output_hidden_states=True in every pass; the thought is the last of them
    cache                   transformers' own, its keys and values sliced to the columns done before every pass; the
                            concatenation that each pass makes of it stays alive for the backward
    passes                  columns before the earliest latent; one column a pass; from the last latent to the end; the
                            number of passes is the largest number of latents in a row
    generate                one sample at a time; the prompt runs through `forward`, then every new token runs the
                            whole sequence again without a cache, with logits for every column

Differences, all in the original's favour or without cost: the image features of a vision-language model are inserted
once (`inputs_embeds`; the original reads text only), K = 0 works, and nothing is printed. As there, rows have to be
aligned on their first latent, and activation checkpointing is not to be had: transformers' own drops the cache.

Shapes: B rows, L columns, H hidden size, K passes with a latent, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OriginalOutput(NamedTuple):
    loss: Tensor  # mean over the label tokens
    inputs_embeds: Tensor  # [B, L, H], thoughts filled in
    logits: Tensor | None  # [B, L, V]; None with logits="labels"


class OriginalCoconut(nn.Module):
    """Meta's training forward and generation around a transformers causal language model.

    Args:
        base_model: any causal language model of transformers.
        latent_token_id: id whose embedding is replaced by the hidden state before it.
        eos_token_id: ends generation.
        logits: "all", or "labels" to compute logits at label positions only, once at the end.
        feedback: "lists", or "column" to rebuild the one column that changes.
        keep_states: ask every pass for the hidden states of all layers.

    Attributes:
        n_forwards: forward passes of the model since the last `generate` began.
    """

    def __init__(
        self,
        base_model: Any,
        latent_token_id: int,
        eos_token_id: int,
        *,
        logits: Literal["all", "labels"] = "all",
        feedback: Literal["lists", "column"] = "lists",
        keep_states: bool = True,
    ) -> None:
        super().__init__()
        assert keep_states or logits == "labels", "only the head-less decoder returns its last hidden state by itself"
        self.base_model = base_model
        self.latent_token_id = latent_token_id
        self.eos_token_id = eos_token_id
        self.logits = logits
        self.feedback = feedback
        self.keep_states = keep_states
        self.n_forwards = 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> OriginalOutput:
        """Loss of a batch whose rows are aligned on their first latent; arguments as in transformers."""
        latents_by_row = [(row == self.latent_token_id).nonzero().flatten().tolist() for row in input_ids]
        n_latents = max(len(columns) for columns in latents_by_row)
        embeds_BLH = self.base_model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        length = input_ids.shape[1]
        start, end = 0, min((columns[0] for columns in latents_by_row if columns), default=length)
        cache = None
        outputs = []
        for number in range(n_latents):
            output_BqX, hidden_BqH, cache = self._run(embeds_BLH, attention_mask, position_ids, start, end, cache)
            outputs.append(output_BqX)
            places = [(row, columns[number]) for row, columns in enumerate(latents_by_row) if len(columns) > number]
            thoughts = {(row, column): hidden_BqH[row, column - 1 - start] for row, column in places}
            rebuild = _rebuild_as_lists if self.feedback == "lists" else _rebuild_columns
            embeds_BLH = rebuild(embeds_BLH, thoughts)
            start, end = end, length if number + 1 == n_latents else end + 1
        output_BqX, _, _ = self._run(embeds_BLH, attention_mask, position_ids, start, end, cache)
        outputs.append(output_BqX)
        self.n_forwards += n_latents + 1
        joined_BLX = torch.cat(outputs, dim=-2)
        if self.logits == "labels":
            return OriginalOutput(self._label_loss(joined_BLX, labels), embeds_BLH, None)
        shifted = joined_BLX[..., :-1, :].contiguous()
        targets = labels[..., 1:].contiguous()
        loss = F.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1))
        return OriginalOutput(loss, embeds_BLH, joined_BLX)

    def _run(
        self, embeds_BLH: Tensor, attention_mask: Tensor, position_ids: Tensor, start: int, end: int, cache: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """One pass over columns [start, end): logits (or hidden states, with logits="labels"), hidden states, cache."""
        if cache is not None:
            for layer in cache.layers:
                layer.keys = layer.keys[:, :, :start]
                layer.values = layer.values[:, :, :start]
        model = self.base_model if self.logits == "all" else self.base_model.get_decoder()
        out = model(
            inputs_embeds=embeds_BLH[:, start:end],
            attention_mask=attention_mask[:, :end],
            position_ids=position_ids[:, start:end],
            past_key_values=cache,
            output_hidden_states=self.keep_states,
            use_cache=True,
        )
        hidden_BqH = out.hidden_states[-1] if self.keep_states else out.last_hidden_state
        return (out.logits if self.logits == "all" else hidden_BqH), hidden_BqH, out.past_key_values

    def _label_loss(self, hidden_BLH: Tensor, labels: Tensor) -> Tensor:
        is_label_BM = labels[:, 1:] != -100
        logits_NV = self.base_model.get_output_embeddings()(hidden_BLH[:, :-1][is_label_BM])
        return F.cross_entropy(logits_NV, labels[:, 1:][is_label_BM])

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int) -> list[int]:
        """Greedy new tokens of one prompt [1, L], the end token left out, as there."""
        assert input_ids.shape[0] == 1, "the original generates one sample at a time"
        self.n_forwards = 0
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        out = self(input_ids, torch.ones_like(input_ids), input_ids.clone(), positions)
        embeds_1LH, logits = out.inputs_embeds, out.logits
        tokens = [int(logits[0, -1].argmax())]
        while len(tokens) < max_new_tokens:
            last = torch.tensor([[tokens[-1]]], device=input_ids.device)
            embeds_1LH = torch.cat([embeds_1LH, self.base_model.get_input_embeddings()(last)], dim=1)
            logits = self.base_model(inputs_embeds=embeds_1LH).logits
            self.n_forwards += 1
            token = int(logits[0, -1].argmax())
            if token == self.eos_token_id:
                break
            tokens.append(token)
        return tokens


def _rebuild_as_lists(embeds_BLH: Tensor, thoughts: dict[tuple[int, int], Tensor]) -> Tensor:
    """One list entry for each row and token, some replaced, stacked again."""
    rows, columns = embeds_BLH.shape[:2]
    tensor_list = [[embeds_BLH[row, column, :] for column in range(columns)] for row in range(rows)]
    for (row, column), thought_H in thoughts.items():
        tensor_list[row][column] = thought_H
    return torch.stack([torch.stack(row) for row in tensor_list])


def _rebuild_columns(embeds_BLH: Tensor, thoughts: dict[tuple[int, int], Tensor]) -> Tensor:
    """The same content without lists: an out-of-place write of the thoughts."""
    rows, columns = zip(*thoughts, strict=True)
    device = embeds_BLH.device
    places = (torch.tensor(rows, device=device), torch.tensor(columns, device=device))
    return embeds_BLH.index_put(places, torch.stack(list(thoughts.values())))
