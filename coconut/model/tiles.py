"""Image tiles as callers may give them, and the places of their features among the tokens.

[P, 3, height, width]                    the tiles of all rows, one after the other
[B, patches, 3, height, width]           each row's tiles, padded to the same number

Shapes: B rows, L columns, H hidden size, P tiles of all rows, T image tokens a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coconut.types import DataError


def flatten_tiles(pixel_values: Tensor, num_patches: Tensor | None) -> Tensor:
    """[B, patches, 3, height, width] -> [P, 3, height, width], padding tiles dropped; four dimensions pass through.

    Raises:
        DataError: neither four nor five dimensions.
    """
    if pixel_values.dim() == 4:
        return pixel_values
    if pixel_values.dim() != 5:
        raise DataError(
            f"pixel_values have {pixel_values.dim()} dimensions, shape {tuple(pixel_values.shape)}; give "
            "[patches, 3, height, width] or [batch, patches, 3, height, width]"
        )
    if num_patches is None:
        return pixel_values.flatten(0, 1)
    real_BP = (
        torch.arange(pixel_values.shape[1], device=pixel_values.device) < num_patches.to(pixel_values.device)[:, None]
    )
    return pixel_values[real_BP]


def real_tiles(pixel_values: Tensor | None, num_patches: Tensor | None, image_flags: Tensor | None) -> Tensor | None:
    """[P, 3, height, width] without padding tiles and without those of rows whose flag is 0; None when none is left."""
    if pixel_values is None or pixel_values.dim() == 4:
        return pixel_values  # a flat list of tiles holds no placeholder
    if image_flags is not None:
        if num_patches is None:
            num_patches = torch.full(pixel_values.shape[:1], pixel_values.shape[1])
        num_patches = num_patches * image_flags.flatten().to(num_patches.device)
    tiles_PCHW = flatten_tiles(pixel_values, num_patches)
    return tiles_PCHW if len(tiles_PCHW) else None


def tiles_a_row(
    pixel_values: Tensor | None,
    visual_features: Tensor | None,
    num_patches: Tensor | None,
    image_flags: Tensor | None,
    rows: int,
) -> list[int] | None:
    """Image tiles of each row; None when several rows share tiles and nothing says which are whose."""
    tiles = pixel_values if pixel_values is not None else visual_features
    if tiles is None:
        return [0] * rows
    if num_patches is not None:
        counts = [int(n) for n in num_patches]
    elif pixel_values is not None and pixel_values.dim() == 5:
        counts = [pixel_values.shape[1]] * rows
    elif rows == 1:
        counts = [tiles.shape[0]]
    else:
        return None
    flags = [1] * rows if image_flags is None else image_flags.flatten().tolist()
    return [count if flag else 0 for count, flag in zip(counts, flags, strict=True)]


def black_tile(size: int) -> Tensor:
    """What the vision tower is shown when there is no image; its features are cut away, not multiplied by zero.

    So it is in the graph and gets gradients of exactly zero, with no arithmetic that makes NaN of an infinity.
    """
    return torch.zeros(1, 3, size, size, dtype=torch.uint8)


def insert_images(
    embeds_BLH: Tensor, input_ids_BL: Tensor, image_token_id: int | None, features_PTH: Tensor | None
) -> Tensor:
    """Put visual features where the image tokens are, in order.

    Raises:
        DataError: more or fewer features than image tokens.
    """
    is_image_BL = torch.eq(input_ids_BL, -1 if image_token_id is None else image_token_id)
    n_tokens = int(is_image_BL.sum())
    if features_PTH is None:
        if n_tokens:
            raise DataError(
                f"input_ids hold {n_tokens} image tokens (id {image_token_id}), but no pixel_values or visual_features "
                "were given"
            )
        return embeds_BLH
    features_NH = features_PTH.reshape(-1, features_PTH.shape[-1])
    if n_tokens != features_NH.shape[0]:
        raise DataError(
            f"input_ids hold {n_tokens} image tokens, but {features_PTH.shape[0]} tiles give {features_NH.shape[0]} "
            f"({features_PTH.shape[1]} a tile); expand one image token a feature, and pass num_patches when "
            "pixel_values are padded"
        )
    return embeds_BLH.index_put(is_image_BL.nonzero(as_tuple=True), features_NH.to(embeds_BLH.dtype))
