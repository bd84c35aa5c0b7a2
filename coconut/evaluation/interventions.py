"""What is changed about a question to learn what an answer hangs on: the picture, or the thoughts.

Every choice is made from a seed and sample keys alone, so it does not depend on ranks or batches.

Shapes: B rows, L columns, K latent columns, T thoughts of a row, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from coconut.types import DataError, Sample

if TYPE_CHECKING:
    from coconut.model.multipass import ThoughtTransform


class SampleSource(Protocol):
    """What can be evaluated: anything that knows its length and gives samples by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample: ...


def image_donors(source: SampleSource, n_samples: int, seed: int) -> dict[int, int]:
    """For each sample with images, another one whose images it is shown instead: one random cycle through them all.

    A cycle leaves no sample its own image and uses each image once, so that the pictures as a set
    stay what they were.

    Raises:
        DataError: fewer than two samples have images.
    """
    members = [index for index in range(n_samples) if has_images(source, index)]
    if len(members) < 2:
        raise DataError(f"{len(members)} of {n_samples} samples have images; shuffling needs at least two")
    return dict(zip(members, _cycle(members, np.random.default_rng(seed)), strict=True))


def noise_like_thoughts(input_ids_BL: Tensor, latent_token_id: int, keys: Sequence[str], seed: int) -> ThoughtTransform:
    """A replacement of thoughts by Gaussian noise of the same norm, alike for a sample in any batch and on any rank.

    Args:
        input_ids_BL: the batch's prompts, left-padded.
        keys: sample key of each row; with seed and the thought's number in its row they decide the noise.
    """
    number_BK = thought_numbers(input_ids_BL, latent_token_id).clamp(min=0)
    n_thoughts = int(number_BK.max()) + 1 if number_BK.numel() else 0
    drawn: list[Tensor] = []

    def draw(width: int) -> Tensor:
        rows = [np.random.Generator(np.random.Philox(key=_hash(seed, key))) for key in keys]
        return torch.from_numpy(np.stack([row.standard_normal((n_thoughts, width)) for row in rows]))

    def transform(thoughts_B1H: Tensor, k: int) -> Tensor:
        if not drawn:
            drawn.append(draw(thoughts_B1H.shape[-1]))
        noise_B1H = drawn[0][torch.arange(len(keys)), number_BK[:, k]][:, None].to(thoughts_B1H)
        scale_B11 = thoughts_B1H.norm(dim=-1, keepdim=True) / noise_B1H.norm(dim=-1, keepdim=True)
        return torch.mul(noise_B1H, scale_B11)

    return transform


def thought_numbers(input_ids_BL: Tensor, latent_token_id: int) -> Tensor:
    """[B, K] on the CPU: which thought of its row, counted from 0, stands in each latent column; -1 where it has none.

    Rows need not be aligned: in left-padded prompts, spans of unequal length begin in different columns.
    """
    is_latent_BL = (input_ids_BL == latent_token_id).cpu()
    columns = is_latent_BL.any(0).nonzero().flatten()
    number_BK = is_latent_BL.long().cumsum(1)[:, columns] - 1
    return number_BK.masked_fill(~is_latent_BL[:, columns], -1)


def given_thoughts(thoughts_BTH: Tensor, number_BK: Tensor) -> ThoughtTransform:
    """A replacement by thoughts that are given, by their number in each row.

    Args:
        thoughts_BTH: thought t of each row; rows with fewer are padded, with anything.
        number_BK: from `thought_numbers`.
    """
    rows_B = torch.arange(len(thoughts_BTH))

    def transform(thought_B1H: Tensor, k: int) -> Tensor:
        return thoughts_BTH[rows_B, number_BK[:, k].clamp(min=0)][:, None].to(thought_B1H)

    return transform


def only_thoughts(transform: ThoughtTransform, chosen: Sequence[int], number_BK: Tensor) -> ThoughtTransform:
    """`transform` at the thoughts with these numbers; the others are thought as ever, from what came before them."""
    is_chosen_BK = torch.isin(number_BK, torch.tensor(list(chosen)))

    def chosen_only(thought_B1H: Tensor, k: int) -> Tensor:
        is_chosen_B11 = is_chosen_BK[:, k, None, None].to(thought_B1H.device)
        return torch.where(is_chosen_B11, transform(thought_B1H, k), thought_B1H)

    return chosen_only


def donors_within(groups: Sequence[object], seed: int) -> list[int | None]:
    """For each sample another of its group, each used once: a random cycle through every group; None when alone."""
    members: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    donors: list[int | None] = [None] * len(groups)
    generator = np.random.default_rng(seed)
    for group_members in members.values():
        if len(group_members) > 1:
            for index, donor in zip(group_members, _cycle(group_members, generator), strict=True):
                donors[index] = donor
    return donors


def other_order(n: int, seed: int, key: str) -> list[int]:
    """A random order of n >= 2 things in which none keeps its place."""
    return _cycle(list(range(n)), np.random.default_rng(_hash(seed, key)))


def _cycle(members: list[int], generator: np.random.Generator) -> list[int]:
    """The members in an order in which each is followed by another: one cycle through them all (Sattolo)."""
    order = list(members)
    for last in range(len(order) - 1, 0, -1):
        other = int(generator.integers(last))
        order[last], order[other] = order[other], order[last]
    return order


def has_images(source: SampleSource, index: int) -> bool:
    try:
        return bool(source.read(index).images)
    except DataError:  # counted and named when its turn comes to be asked
        return False


def _hash(seed: int, key: str) -> int:
    """128 bits from seed and key, alike on every machine (Python's own hash is salted)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:16], "little")
