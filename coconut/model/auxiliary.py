"""Losses on the thoughts themselves, beside the one on the text.

A loss is a function, or an `nn.Module` with weights of its own, that takes a `ThoughtContext` and returns the *sum* of
its terms over the batch. The trainer divides it, as the text's loss, by the label tokens of the whole step, so that the
result depends neither on the number of ranks nor on how the step is cut into micro-batches.

    loss = (sum of cross-entropies + sum over auxiliary losses of weight * loss(context)) / label tokens of the step

`docs/examples/visual_latent_loss.py` is one, and is named in a configuration by its module and name:

    auxiliary_losses: {"docs.examples.visual_latent_loss:visual_latent_loss": 0.1}
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from coconut.types import ConfigError


@dataclass(frozen=True)
class ThoughtContext:
    """What an auxiliary loss may look at; every tensor carries gradients where it has any.

    Every rank calls the loss in every step, also with K = 0 or without an image: it must then return a zero that hangs
    on its inputs (the sum of an empty selection does).
    """

    thoughts_BKH: Tensor  # the embeddings that were fed back
    is_thought_BK: Tensor  # bool; False where a row has no latent in that latent column
    hidden_BLH: Tensor  # hidden states of all columns, after the final norm
    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    labels_BL: Tensor
    visual_features_PTH: Tensor | None  # features of the tiles of all rows, in order


AuxiliaryLoss = Callable[[ThoughtContext], Tensor]


def load_auxiliary_loss(path: str) -> AuxiliaryLoss:
    """The loss that ``"package.module:name"`` names; a class is instantiated without arguments.

    Raises:
        ConfigError: no such module, or no such name in it.
    """
    module_name, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'auxiliary_losses names {path!r}, which cannot be imported ({error}); write "package.module:name" of a '
            "function or class that Python finds from here"
        ) from error
    return found() if isinstance(found, type) else found
