"""What is fed back as a thought: how a hidden state becomes the input embedding that continues it.

    hidden      the hidden state itself (arXiv 2412.06769): the default, and what the paper's results are for
    normed      the hidden state at the length of an ordinary embedding
    projector   the hidden state through a small residual network that is trained along
    none        nothing: the latent token keeps its own embedding, a pause (arXiv 2310.02226); for comparison

After its final norm a hidden state of a large model may be far longer than any embedding it was trained on, and people
who trained the original on models beyond GPT-2 report collapse; `normed` takes that away without a parameter,
`projector` lets the model learn the map, beginning with `normed`.

Shapes: B rows, q columns, H hidden size.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from coconut.types import ConfigError

FeedbackName = Literal["hidden", "normed", "projector", "none"]


class NormedFeedback(nn.Module):
    """The hidden state, rescaled to the norm of an ordinary embedding.

    Args:
        embedding_norm: mean Euclidean norm of the embedding table's rows.
    """

    def __init__(self, embedding_norm: float) -> None:
        super().__init__()
        self.embedding_norm = embedding_norm

    def forward(self, hidden_BqH: Tensor) -> Tensor:
        # In float32: squares of large activations leave the range of float16, and the digits of bfloat16.
        wide = hidden_BqH if hidden_BqH.dtype == torch.float64 else hidden_BqH.float()
        scale = self.embedding_norm * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-12)
        return (wide * scale).to(hidden_BqH.dtype)


class ProjectorFeedback(nn.Module):
    """The rescaled hidden state plus a two-layer network of it; at first exactly `NormedFeedback`.

    Args:
        embedding_norm: as in `NormedFeedback`.
        hidden_size: H.
    """

    def __init__(self, embedding_norm: float, hidden_size: int) -> None:
        super().__init__()
        self.normed = NormedFeedback(embedding_norm)
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, hidden_size)
        self.down = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden_BqH: Tensor) -> Tensor:
        residual_BqH: Tensor = self.down(nn.functional.gelu(self.up(self.norm(hidden_BqH))))
        return self.normed(hidden_BqH) + residual_BqH


def build_feedback(name: str, embedding_norm: float, hidden_size: int) -> nn.Module | None:
    """The module of a name of `latent_feedback`; None where there is nothing to compute.

    Raises:
        ConfigError: no such name.
    """
    if name in ("hidden", "none"):
        return None
    if name == "normed":
        return NormedFeedback(embedding_norm)
    if name == "projector":
        return ProjectorFeedback(embedding_norm, hidden_size)
    raise ConfigError(f"latent_feedback is {name!r}; choose from {', '.join(get_args(FeedbackName))}")
