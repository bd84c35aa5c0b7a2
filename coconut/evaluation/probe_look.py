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

from coconut.evaluation.probe import Study

if TYPE_CHECKING:
    from coconut.model.coconut import MultimodalCoconut


@dataclass(frozen=True)
class Look:
    """Attention to the picture's tokens while one thing is computed."""

    label: str
    weights_yx: NDArray[np.float64]  # grid of image tokens; sums to 1
    share: float  # of all attention, what went to the picture


@torch.no_grad()
def looks(study: Study, row: int, layer: int | None = None) -> list[Look]:
    """For each thought of a sample, and for its answer, the attention to the image; none for a text-only sample.

    Of an image cut into tiles, the last one is taken: the thumbnail, which shows all of it. Several tiles without a
    thumbnail give nothing.
    """
    features = study.features[row]
    n_tokens = study.model.tokens_per_patch
    side = isqrt(n_tokens)
    processor = study.loaded.processor
    whole = features["num_patches"] == 1 or (processor is not None and processor.use_thumbnail)
    if not features["num_patches"] or side * side != n_tokens or len(features["patches_per_image"]) != 1 or not whole:
        return []
    ids_L = features["input_ids"].to(study.model.device)
    image_N = (ids_L == study.model.backbone.image_token_id).nonzero().flatten()[-n_tokens:]
    queries = _queries(study, features)
    with eager_attention(study.model):
        output = study.model(
            input_ids=ids_L[None],
            pixel_values=features["pixel_values"].to(study.model.device),
            output_attentions=True,
        )
    # [layers, queries, L], the mean over heads
    weights = torch.stack([layer[0].float().mean(0)[list(queries.values())] for layer in output.attentions])
    shown = weights[..., image_N].double().cpu()
    found = []
    for number, label in enumerate(queries):
        chosen = _sharpest(shown[:, number]) if layer is None else layer
        share = float(shown[chosen, number].sum())
        grid = (shown[chosen, number] / max(share, 1e-12)).reshape(side, side).numpy()
        found.append(Look(label, grid, share))
    return found


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
    """The picture as a PNG file, bright where the model looks and dim where it does not."""
    rgb_yxc = np.asarray(picture.convert("RGB").resize((side_px, side_px)), dtype=np.float64)
    scaled = weights_yx / max(float(weights_yx.max()), 1e-12)
    light = Image.fromarray((scaled * 255).astype(np.uint8)).resize((side_px, side_px), Image.Resampling.NEAREST)
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
