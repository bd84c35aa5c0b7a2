"""Next-token loss at label positions only: no [batch, length, vocabulary] tensor ever exists.

Shapes: B rows, L columns, H hidden size, N label tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coconut.types import IGNORE_INDEX

#: Label tokens whose logits exist at one time: 1024 x 151,674 float32 logits are 0.6 GB.
CHUNK_TOKENS = 1024


def n_chunks(n_label_tokens: int) -> int:
    """How often the head is called for so many label tokens; at least once, as ZeRO-3 counts calls."""
    return max(1, math.ceil(n_label_tokens / CHUNK_TOKENS))


def label_positions(labels_BL: Tensor) -> Tensor:
    """[B, L-1] mask of the positions whose *next* token carries a label."""
    return labels_BL[:, 1:] != IGNORE_INDEX


def _chunk_loss(head: Callable[[Tensor], Tensor], hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = head(hidden_NH)
    if logits_NV.dtype in (torch.float16, torch.bfloat16):
        logits_NV = logits_NV.float()
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")


def label_loss(head: Callable[[Tensor], Tensor], hidden_BLH: Tensor, labels_BL: Tensor, chunks: int = 1) -> Tensor:
    """Sum of the cross-entropy over all label tokens (a scalar; zero, with a graph, when there are none).

    Args:
        head: maps hidden states to logits.
        chunks: calls of the head, at least ``n_chunks(N)``, the same on every rank; surplus ones are empty. With
            more than one, logits are recomputed in the backward instead of kept.
    """
    selected_BM = label_positions(labels_BL)
    return chunked_loss(head, hidden_BLH[:, :-1][selected_BM], labels_BL[:, 1:][selected_BM], chunks)


def chunked_loss(head: Callable[[Tensor], Tensor], hidden_NH: Tensor, targets_N: Tensor, chunks: int) -> Tensor:
    """`label_loss` of hidden states and labels that are picked already."""
    total = hidden_NH.new_zeros((), dtype=torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32)
    for chunk in range(chunks):
        part = slice(chunk * CHUNK_TOKENS, (chunk + 1) * CHUNK_TOKENS)
        hidden, targets = hidden_NH[part], targets_N[part]
        if chunks > 1 and torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, head, hidden, targets, use_reentrant=False)
        else:
            total = total + _chunk_loss(head, hidden, targets)
    return total
