"""How long thoughts are beside the embeddings of the text: L2 norms, summed while a model trains.

A thought is fed back in the place of an embedding. Where its norm leaves that of the embeddings by far, the decoder
reads an input that it was never trained on: the first thing to look at when thoughts do not learn.

Shapes: B rows, L columns, H hidden size, K latent columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NormMeter:
    """Sums over forward passes, kept on the model's device until they are taken: no forward waits for them."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # float64 [4]: thoughts' norms, thoughts, embeddings' norms, embeddings

    @torch.no_grad()
    def add(self, thoughts_BKH: Tensor, is_thought_BK: Tensor, embeds_BLH: Tensor, is_text_BL: Tensor) -> None:
        """The thoughts that were fed back, and the embeddings of the text's tokens, of one batch."""
        parts = []
        for vectors, chosen in ((thoughts_BKH, is_thought_BK), (embeds_BLH, is_text_BL)):
            dtype = torch.promote_types(vectors.dtype, torch.float32)  # half precision overflows on squares
            norms = torch.linalg.vector_norm(vectors.detach(), dim=-1, dtype=dtype)
            parts += [torch.where(chosen, norms, 0.0).sum(dtype=torch.float64), chosen.sum().to(torch.float64)]
        sums = torch.stack(parts)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> list[float]:
        """Norms of thoughts (sum), thoughts, norms of embeddings (sum), embeddings; begins anew."""
        sums, self._sums = self._sums, None
        return [0.0] * 4 if sums is None else sums.tolist()
