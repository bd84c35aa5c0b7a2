"""Image tiles as callers may give them: a flat list in the order of their image tokens, or padded row by row.

[P, 3, height, width]                    the tiles of all rows, one after the other
[B, patches, 3, height, width]           each row's tiles, padded to the same number
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
