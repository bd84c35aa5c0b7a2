"""Where the latents of a batch stand, and how its columns are cut into passes. Pure index arithmetic.

Shapes: B rows, L columns, K latent columns.

A latent's input embedding is the last hidden state of the column before it, so the columns are cut before latents:

    latent columns {5, 6, 7}, L = 12
    one after the other      ->   [0,5) [5,6) [6,7) [7,12)     K + 1 calls of the decoder
    together, n iterations   ->   [0,5) n x [5,8) ... [5,12)   n + 1 calls (arXiv 2506.18582)

Under ZeRO-3 every rank must call the decoder equally often. A rank with fewer latents than another cuts its
columns in as many pieces all the same: a cut without a latent changes nothing but the cost (the key/value cache
makes a causal decoder indifferent to where its input is cut), so no dummy work exists that could go wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from coconut.types import DataError


@dataclass(frozen=True, eq=False)
class Segment:
    """Columns [start, end) that the decoder sees in one pass; the first `n_latents` of them are latent columns."""

    start: int
    end: int
    n_latents: int = 0
    calls: int = 1  # of the decoder: all but the last see the latent columns only
    window: tuple[Tensor, Tensor] | None = None  # of `update_window`, where latents are computed together


def check_shapes(input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None) -> None:
    """Raise DataError where a tensor is not [B, L] as the ids are; torch would stretch some, and the loss be wrong."""
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise DataError(
                f"{name} is {list(tensor.shape)}, but input_ids are {list(input_ids.shape)}; give one value a token"
            )


def latent_columns(input_ids_BL: Tensor, latent_token_id: int, attention_mask_BL: Tensor) -> list[int]:
    """Columns in which at least one row has a latent, ascending.

    Raises:
        DataError: a latent is its row's first token, so no hidden state comes before it.
    """
    is_latent_BL = input_ids_BL == latent_token_id
    before_BL = torch.nn.functional.pad(attention_mask_BL[:, :-1].bool(), (1, 0), value=False)
    if bool((is_latent_BL & ~before_BL).any()):
        row = int((is_latent_BL & ~before_BL).any(1).nonzero()[0])
        raise DataError(
            f"row {row} of the batch begins with a latent token (id {latent_token_id}); a latent continues the hidden "
            "state of the token before it, so at least one token must come first"
        )
    return is_latent_BL.any(0).nonzero().flatten().tolist()


def latent_blocks(columns: list[int], together: bool) -> list[tuple[int, int]]:
    """(first column, number of columns) of the latents that are computed in one pass.

    Args:
        columns: latent columns, ascending.
        together: neighbouring columns form one block; otherwise each column is one.
    """
    blocks: list[tuple[int, int]] = []
    for column in columns:
        if together and blocks and column == sum(blocks[-1]):
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + 1)
        else:
            blocks.append((column, 1))
    return blocks


def update_window(is_latent_Bn: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """First and last update [B, n] of each latent of a block, counted from 1; last < first where there is none.

    The rows of a block need not begin or end with the same column. A span that begins after tokens of its own row is
    ready one update later than one at the block's beginning (update 0); the next span of a row waits for the one before
    it. So each row gets what it would get alone.
    """
    is_latent_Bn = is_latent_Bn.cpu()
    width = is_latent_Bn.shape[1]
    lengths = [torch.zeros(is_latent_Bn.shape[0], dtype=torch.long)]  # of what is left of the span, from each column
    for column in reversed(range(width)):
        lengths.insert(0, is_latent_Bn[:, column] * (1 + lengths[0]))
    first_Bn, last_Bn = (
        torch.ones_like(is_latent_Bn, dtype=torch.long),
        torch.zeros_like(is_latent_Bn, dtype=torch.long),
    )
    ready_B = last_B = torch.zeros_like(lengths[0])
    for column in range(width):
        is_latent_B = is_latent_Bn[:, column]
        begins_B = is_latent_B & ~is_latent_Bn[:, column - 1] if column else is_latent_B
        ready_B = torch.where(begins_B, last_B + 1 if column else last_B, ready_B)
        last_B = torch.where(begins_B, ready_B + lengths[column].clamp(max=iterations) - 1, last_B)
        first_Bn[:, column] = torch.where(is_latent_B, torch.where(begins_B, ready_B, ready_B + 1), 1)
        last_Bn[:, column] = torch.where(is_latent_B, last_B, 0)
    return first_Bn, last_Bn


def _windows(
    blocks: list[tuple[int, int]], is_latent_BL: Tensor, iterations: int | None
) -> dict[int, tuple[Tensor, Tensor] | None]:
    """Update window of each block, by its first column; None where nothing is updated."""
    if iterations is None:
        return {start: None for start, _ in blocks}
    return {start: update_window(is_latent_BL[:, start : start + width], iterations) for start, width in blocks}


def _calls(window: tuple[Tensor, Tensor] | None) -> int:
    return 1 if window is None else 1 + int(window[1].max())


def count_calls(columns: list[int], is_latent_BL: Tensor, iterations: int | None) -> int:
    """Calls of the decoder that latents in these columns take; see `cut_into_passes`."""
    blocks = latent_blocks(columns, iterations is not None)
    return 1 + sum(map(_calls, _windows(blocks, is_latent_BL, iterations).values()))


def cut_into_passes(
    columns: list[int], is_latent_BL: Tensor, n_calls: int | None = None, iterations: int | None = None
) -> list[Segment]:
    """Cut the columns of a batch into segments, one starting at each block of latents.

    Surplus cuts are made one column each from the left, where attention is cheapest.

    Args:
        columns: latent columns, ascending, each in [1, L).
        is_latent_BL: where the latents are; ``n_calls + len(columns)`` columns are always enough.
        n_calls: calls of the decoder to make, at least those of `count_calls`; None makes no surplus.
        iterations: None computes the latents one after the other, else neighbouring ones together, this many times; a
            span needs no more iterations than it has latents to be exact.
    """
    length = is_latent_BL.shape[1]
    blocks = latent_blocks(columns, iterations is not None)
    windows = _windows(blocks, is_latent_BL, iterations)
    surplus = 0 if n_calls is None else n_calls - 1 - sum(map(_calls, windows.values()))
    assert surplus >= 0, (columns, n_calls, iterations)
    width_at = dict(blocks)
    inside = {start + i for start, width in blocks for i in range(1, width)}
    starts = set(width_at)
    column = 1
    while surplus:
        assert column < length, (columns, length, n_calls)
        if column not in starts and column not in inside:
            starts.add(column)
            surplus -= 1
        column += 1
    return [
        Segment(start, end, width_at.get(start, 0), _calls(windows.get(start)), windows.get(start))
        for start, end in pairwise([0, *sorted(starts), length])
    ]
