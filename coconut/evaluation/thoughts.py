"""A model stopped between thinking and answering, so that what it remembers can be changed before it goes on.

    prompt + image --think--> Memory (keys and values up to the last thought) --edit--> Memory --answer--> text
                                                                                        --likelihood--> nats

`MultimodalCoconut.generate` does both halves at once and numbers positions by the mask. Here a masked thought keeps
its position, so that cutting it out moves nothing else.

Shapes: B rows, C columns up to the last thought, K latent columns, H hidden size, T target tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from coconut.evaluation.interventions import thought_numbers
from coconut.model.pass_cache import CACHE_ARGUMENT
from coconut.types import Sample

if TYPE_CHECKING:
    from coconut.data.collate import MultimodalCollator
    from coconut.model.coconut import MultimodalCoconut
    from coconut.model.multipass import ThoughtTransform


@dataclass(frozen=True)
class Prompts:
    """A batch of questions on their way to the model, and what they are to be answered with."""

    rows: tuple[int, ...]  # numbers of the samples in the study
    keys: tuple[str, ...]
    samples: tuple[Sample, ...]  # without image bytes
    tensors: dict[str, Tensor]  # input_ids, attention_mask, pixel_values ..., left-padded, on the CPU
    number_BK: Tensor  # thought of its row in each latent column, -1 where it has none
    targets: tuple[tuple[int, ...], ...]  # label ids of each row: remaining steps and answer
    answer_lengths: tuple[int, ...]  # last tokens of the target that are the answer
    prompt_lengths: tuple[int, ...]
    num_patches: tuple[int, ...]
    latent_token_id: int

    @property
    def n_thoughts(self) -> list[int]:
        """Thoughts of each row."""
        return [int(n) + 1 for n in self.number_BK.max(1).values]

    @property
    def latent_mask(self) -> Tensor:
        return torch.eq(self.tensors["input_ids"][:, :-1], self.latent_token_id)


def collate_questions(
    features: Sequence[dict[str, Any]], rows: Sequence[int], collator: MultimodalCollator, latent_token_id: int
) -> Prompts:
    """A batch of features from `SampleEncoder.with_stage`."""
    batch = collator.collate_prompts(features)
    tensors = {name: value for name, value in batch.tensors.items() if isinstance(value, Tensor)}
    return Prompts(
        rows=tuple(rows),
        keys=batch.keys,
        samples=tuple(feature["sample"] for feature in features),
        tensors=tensors,
        number_BK=thought_numbers(tensors["input_ids"], latent_token_id),
        targets=tuple(tuple(int(i) for i in target) for target in batch.extras["targets"]),
        answer_lengths=tuple(len(feature["text"].answer) for feature in features),
        prompt_lengths=tuple(int(feature["prompt_length"]) for feature in features),
        num_patches=tuple(int(feature["num_patches"]) for feature in features),
        latent_token_id=latent_token_id,
    )


@dataclass(frozen=True)
class Memory:
    """What a model has of the question and its thoughts when it begins to answer."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values [B, heads, C, head_dim], a pair a decoder layer
    mask_BC: Tensor  # 1 where the answer may look
    position_B: Tensor  # of the next token
    next_B1: Tensor  # that token: the last of the prompt
    thoughts_BKH: Tensor  # as they were fed back, in the latent columns

    def without(self, hidden_BC: Tensor) -> Memory:
        """The same memory with some columns hidden from the answer."""
        mask_BC = self.mask_BC * (~hidden_BC).to(self.mask_BC)
        return dataclasses.replace(self, mask_BC=mask_BC)

    def with_columns_of(self, other: Memory, taken_BC: Tensor) -> Memory:
        """The same memory with the keys and values of some columns taken from another one, column for column."""
        taken_B1C1 = taken_BC[:, None, :, None].to(self.mask_BC.device)
        layers = tuple(
            (torch.where(taken_B1C1, their_keys, keys), torch.where(taken_B1C1, their_values, values))
            for (keys, values), (their_keys, their_values) in zip(self.layers, other.layers, strict=True)
        )
        return dataclasses.replace(self, layers=layers)


@torch.no_grad()
def think(model: MultimodalCoconut, prompts: Prompts, transform: ThoughtTransform | None = None) -> Memory:
    """Read the prompts and think, up to the last thought; the token after it is left for the answer to read."""
    tensors = {name: value.to(model.device) for name, value in prompts.tensors.items()}
    ids_BC, mask_BC = tensors["input_ids"][:, :-1], tensors["attention_mask"][:, :-1]
    output = model(
        input_ids=ids_BC,
        attention_mask=mask_BC,
        pixel_values=tensors.get("pixel_values"),
        num_patches=tensors.get("num_patches"),
        use_cache=True,
        output_thoughts=True,
        thought_transform=transform,
    )
    return Memory(
        layers=tuple((layer.keys, layer.values) for layer in output.past_key_values.layers),
        mask_BC=mask_BC,
        position_B=mask_BC.sum(1),
        next_B1=tensors["input_ids"][:, -1:],
        thoughts_BKH=output.thoughts,
    )


def likelihood(model: MultimodalCoconut, memory: Memory, prompts: Prompts) -> list[float]:
    """Log-likelihood in nats of each row's answer tokens, end of sequence counted, after its true remaining steps."""
    return [nats for nats, _ in likelihood_and_greedy(model, memory, prompts)]


@torch.no_grad()
def likelihood_and_greedy(model: MultimodalCoconut, memory: Memory, prompts: Prompts) -> list[tuple[float, bool]]:
    """As `likelihood`, and whether each answer token is the likeliest, so that greedy decoding writes the answer."""
    length = max(map(len, prompts.targets))
    read_BT = torch.zeros(len(prompts.targets), length, dtype=torch.long)
    counted_BT = torch.zeros(len(prompts.targets), length, dtype=torch.bool)
    for row, (target, n_answer) in enumerate(zip(prompts.targets, prompts.answer_lengths, strict=True)):
        read_BT[row, : len(target)] = torch.tensor(target)
        counted_BT[row, len(target) - n_answer : len(target)] = True
    read_BT, counted_BT = read_BT.to(model.device), counted_BT.to(model.device)
    ids_BT = torch.cat([memory.next_B1, read_BT[:, :-1]], dim=1)
    logits_BTV = _read_on(model, memory, ids_BT, _cache(model, memory), 0).float()
    chosen_BT = logits_BTV.log_softmax(-1).gather(-1, read_BT[..., None])[..., 0]
    nats_B = (chosen_BT.double() * counted_BT).sum(1).tolist()
    greedy_B = ((logits_BTV.argmax(-1) == read_BT) | ~counted_BT).all(1).tolist()
    return list(zip(nats_B, greedy_B, strict=True))


@torch.no_grad()
def answer(model: MultimodalCoconut, memory: Memory, max_new_tokens: int) -> list[list[int]]:
    """Greedy continuation of each row, without its end-of-sequence id."""
    cache = _cache(model, memory)
    ids_B1, said = memory.next_B1, []
    ended_B = torch.zeros(len(ids_B1), dtype=torch.bool, device=ids_B1.device)
    for step in range(max_new_tokens):
        logits_B1V = _read_on(model, memory, ids_B1, cache, step)
        ids_B1 = logits_B1V.argmax(-1)
        said.append(ids_B1)
        ended_B |= ids_B1[:, 0] == model.eos_token_id
        if bool(ended_B.all()):
            break
    rows: list[list[int]] = torch.cat(said, dim=1).tolist()
    return [row[: row.index(model.eos_token_id)] if model.eos_token_id in row else row for row in rows]


def _cache(model: MultimodalCoconut, memory: Memory) -> DynamicCache:
    cache = DynamicCache(config=model.backbone.text_config)
    for number, (keys, values) in enumerate(memory.layers):
        cache.update(keys, values, number)
    return cache


def _read_on(model: MultimodalCoconut, memory: Memory, ids_BT: Tensor, cache: DynamicCache, n_read: int) -> Tensor:
    """Logits [B, T, V] of tokens that follow the memory and `n_read` tokens already in the cache."""
    rows, length = ids_BT.shape
    mask = torch.cat([memory.mask_BC, memory.mask_BC.new_ones(rows, n_read + length)], dim=1)
    position_BT = memory.position_B[:, None] + n_read + torch.arange(length, device=ids_BT.device)
    output = model.base_model(
        input_ids=ids_BT, attention_mask=mask, position_ids=position_BT, use_cache=True, **{CACHE_ARGUMENT: cache}
    )
    logits: Tensor = output.logits
    return logits


def thoughts_of_rows(memory: Memory, prompts: Prompts) -> list[Tensor]:
    """The thoughts [k, H] of each row by their number, on the CPU in float32."""
    thoughts_BKH = memory.thoughts_BKH.float().cpu()
    return [row_KH[number_K >= 0] for row_KH, number_K in zip(thoughts_BKH, prompts.number_BK, strict=True)]


#: Makes the replacement of a batch's thoughts; None leaves them.
MakeTransform = Callable[[Prompts], "ThoughtTransform"]
#: Changes what is remembered of a batch, before it is answered.
Edit = Callable[[Memory, Prompts], Memory]
