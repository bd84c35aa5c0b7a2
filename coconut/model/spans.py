"""Where the latents of a batch stand, and how its columns are cut into passes. Pure index arithmetic.

Shapes: B rows, L columns, K latent columns.

A latent's input embedding is the last hidden state of the column before it, so every latent column starts a
new pass. The columns are cut there:

    latent columns {5, 6, 7}, L = 12   ->   [0,5) [5,6) [6,7) [7,12)      K + 1 passes

Under ZeRO-3 every rank must call the decoder equally often. A rank with fewer latents than another cuts its
columns in as many pieces all the same: a cut without a latent changes nothing but the cost (the key/value cache
makes a causal decoder indifferent to where its input is cut), so no dummy work exists that could go wrong.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from coconut.types import DataError


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


def cut_into_passes(columns: list[int], length: int, n_passes: int) -> list[tuple[int, int]]:
    """Cut `length` columns into exactly `n_passes` segments, one starting at each of `columns`.

    Surplus cuts are made one column each from the left, where attention is cheapest.

    Args:
        columns: latent columns, ascending, each in [1, length).
        length: number of columns, at least `n_passes`.
        n_passes: at least ``len(columns) + 1``.
    """
    assert len(columns) < n_passes <= length, (columns, n_passes, length)
    starts = set(columns)
    column = 1
    while len(starts) < n_passes - 1:
        starts.add(column)
        column += 1
    bounds = [0, *sorted(starts), length]
    return list(pairwise(bounds))
