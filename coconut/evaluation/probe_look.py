"""Where on the picture the model looks while it makes a thought, and while it answers.

The state that becomes thought t is computed one column before the thought; its attention to the image tokens is what
is drawn: the mean over heads, of the layer that looks at the picture most sharply (or of a layer that is asked for).

Shapes: L columns, N image tokens of a tile.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from coconut.evaluation.loaded import Loaded
from coconut.evaluation.probe import Study

if TYPE_CHECKING:
    from coconut.model.coconut import MultimodalCoconut


@dataclass(frozen=True)
class Look:
    """Attention to the picture's tokens while one thing is computed."""

    label: str
    weights_yx: NDArray[np.float64]  # grid of image tokens; sums to 1
    share: float  # of all attention, what went to the picture


def looks(study: Study, row: int, layer: int | None = None) -> list[Look]:
    """For each thought of a sample, and for its answer, the attention to the image; none for a text-only sample.

    Of an image cut into tiles, the last one is taken: the thumbnail, which shows all of it. Several tiles without a
    thumbnail give nothing.
    """
    features = study.features[row]
    if not shows_whole_picture(study.loaded, features):
        return []
    return look(study.loaded, features, _queries(study, features), layer).looks


def shows_whole_picture(loaded: Loaded, features: dict[str, Any]) -> bool:
    """Whether one square tile of image tokens shows all of the only picture, so that attention can be drawn on it."""
    n_tokens = loaded.model.tokens_per_patch
    whole = features["num_patches"] == 1 or (loaded.processor is not None and loaded.processor.use_thumbnail)
    return bool(whole and n_tokens == isqrt(n_tokens) ** 2 and len(features["patches_per_image"]) == 1)


@dataclass(frozen=True)
class Seen:
    """What one reading of a prompt shows: attention to the picture, and the thoughts [K, H] as they were fed back."""

    looks: list[Look]
    thoughts_KH: Tensor


@torch.no_grad()
def look(
    loaded: Loaded, features: dict[str, Any], queries: dict[str, int], layer: int | None = None, draw: bool = True
) -> Seen:
    """Read a prompt once more, keeping what the columns of `queries` attend to.

    Args:
        loaded: a checkpoint.
        features: of one sample, with `input_ids` (see `coconut.data.encode`).
        queries: columns by what is computed in them.
        layer: of the decoder; None takes for each column the one that looks at the picture most sharply.
        draw: False keeps the thoughts alone, for a prompt that has no picture to draw on (`shows_whole_picture`).
    """
    model = loaded.model
    ids_L = features["input_ids"].to(model.device)
    pixels = features["pixel_values"]
    inputs = {"input_ids": ids_L[None], "pixel_values": None if pixels is None else pixels.to(model.device)}
    inputs |= {"output_thoughts": True, "loss_only": True}  # no labels either: logits are not needed
    if not draw:
        return Seen([], model(**inputs).thoughts[0])
    n_tokens = model.tokens_per_patch
    side = isqrt(n_tokens)
    image_N = (ids_L == model.backbone.image_token_id).nonzero().flatten()[-n_tokens:]
    with eager_attention(model):
        output = model(**inputs, output_attentions=True)
    # [layers, queries, L], the mean over heads
    weights = torch.stack([layer[0].float().mean(0)[list(queries.values())] for layer in output.attentions])
    shown = weights[..., image_N].double().cpu()
    found = []
    for number, label in enumerate(queries):
        chosen = _sharpest(shown[:, number]) if layer is None else layer
        share = float(shown[chosen, number].sum())
        grid = (shown[chosen, number] / max(share, 1e-12)).reshape(side, side).numpy()
        found.append(Look(label, grid, share))
    return Seen(found, output.thoughts[0])


def _queries(study: Study, features: dict[str, Any]) -> dict[str, int]:
    """The column in which each thought is computed, and that in which the answer's first word is."""
    ids = features["input_ids"].tolist()
    latents = [column for column, token in enumerate(ids) if token == study.model.latent_token_id]
    mark = len(study.tokenizer("###", add_special_tokens=False)["input_ids"])
    first = len(ids) - len(features["text"].answer) + mark
    return {**{f"thought {t + 1}": column - 1 for t, column in enumerate(latents)}, "answer": first - 1}


def _sharpest(weights_layer_N: Tensor) -> int:
    """The layer with most attention on a single image token."""
    return int(weights_layer_N.max(dim=1).values.argmax())


@contextmanager
def eager_attention(model: MultimodalCoconut) -> Iterator[None]:
    """The attention that keeps its weights, and then the one that was."""
    before = model.backbone.text_config._attn_implementation
    model.base_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.base_model.set_attn_implementation(before)


def paint(picture: Image.Image, weights_yx: NDArray[np.float64], side_px: int) -> bytes:
    """The picture as a PNG file, `side_px` on its longer side, bright where the model looks and dim elsewhere."""
    scale = side_px / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    rgb_yxc = np.asarray(picture.convert("RGB").resize(size), dtype=np.float64)
    scaled = weights_yx / max(float(weights_yx.max()), 1e-12)
    light = Image.fromarray((scaled * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    light_yx1 = np.asarray(light, dtype=np.float64)[..., None] / 255
    dim_yxc = 0.18 * rgb_yxc + 0.10 * 255 * 0.3
    drawn = dim_yxc + (rgb_yxc - dim_yxc) * light_yx1
    buffer = io.BytesIO()
    Image.fromarray(drawn.clip(0, 255).astype(np.uint8)).quantize(96).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def attention_on_path(study: Study, paths: Sequence[Sequence[int]], rows: Sequence[int]) -> dict[str, Any]:
    """For the maze: the share of picture attention that lands on each cell of the path, by what is computed.

    Args:
        paths: cells of each sample's path, numbered as the image tokens are.
        rows: samples to average over.
    """
    labels: list[str] = []
    sums: NDArray[np.float64] | None = None
    for row in rows:
        found = looks(study, row)
        labels = [look.label for look in found]
        values = np.array([[look.weights_yx.flat[cell] for cell in paths[row]] for look in found])
        sums = values if sums is None else sums + values
    assert sums is not None
    columns = ["start", *(f"after hop {hop}" for hop in range(1, sums.shape[1]))]
    return {"rows": labels, "columns": columns, "share": (sums / len(rows)).tolist(), "n": len(rows)}
