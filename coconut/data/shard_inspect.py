"""Samples of a set, to look at: their texts as lines, and their tiles in one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from coconut.data.shards import ShardReader
from coconut.types import Sample

if TYPE_CHECKING:
    import torch

    from coconut.data.image import ImageProcessor

_TILE = 112  # pixels of a tile's side in the picture
_GAP = 4
_CAPTION = 18  # pixels of a line
_PAGE = 1200  # pixels of the picture's width, about
_INK, _SOFT, _PAPER, _RULE = (29, 33, 38), (95, 102, 112), (255, 255, 255), (228, 225, 218)


def inspect_shards(directory: str | Path, n: int, processor: ImageProcessor, picture: Path) -> str:
    """Describe `n` samples spread over the set, and draw their tiles into `picture`, a PNG.

    Raises:
        DataError: no shards are there, or a sample cannot be read.
    """
    reader = ShardReader(directory)
    chosen = np.unique(np.linspace(0, len(reader) - 1, min(n, len(reader))).round().astype(int)).tolist()
    lines, sheets = [], []
    for index in chosen:
        sample = reader.read(index)
        lines += [*describe(sample, index, reader.image_sizes(index)), ""]
        tiles = [processor.process_image(image) for image in sample.images]
        for number, tiles_PCHW in enumerate(tiles, start=1):
            width, height = reader.image_sizes(index)[number - 1]
            caption = (
                f"{sample.key}, image {number}: {width} x {height}, {len(tiles_PCHW)} tile{'s' * (len(tiles_PCHW) > 1)}"
            )
            sheets.append(contact_sheet(tiles_PCHW, processor.grid(width, height), caption))
    if not sheets:
        return "\n".join([*lines, "none of these samples has an image: no picture was drawn"])
    arranged(sheets).save(picture)
    return "\n".join([*lines, f"tiles: {picture}"])


def describe(sample: Sample, index: int, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """A sample as lines of text."""
    images = ", ".join(f"{width} x {height}" for width, height in sizes) or "none"
    lines = [f"sample {index}: key {sample.key}, {sample.source}, images: {images}"]
    pairs = [("question", sample.question)]
    pairs += [(f"step {number}", step) for number, step in enumerate(sample.steps, start=1)]
    pairs += [("answer", sample.answer)]
    for name, text in pairs:
        shown = textwrap.shorten(text, 240, placeholder=" ...")
        lines += textwrap.wrap(f"  {name:9s} {shown}", 110, subsequent_indent=" " * 12)
    return lines


def contact_sheet(tiles_PCHW: torch.Tensor, grid: tuple[int, int], caption: str = "", tile: int = _TILE) -> Image.Image:
    """Tiles as they lie in the image, the thumbnail beside them, numbered in the order in which the model gets them.

    Args:
        tiles_PCHW: uint8 [P, 3, H, W], of one image.
        grid: columns and rows of tiles, from `ImageProcessor.grid`; a tile beyond them is the thumbnail.
        tile: pixels of a tile's side in the picture.
    """
    n = len(tiles_PCHW)
    columns, rows = grid
    has_thumbnail = n > columns * rows
    top = _CAPTION if caption else 0
    step = tile + _GAP
    width = columns * step + _GAP + has_thumbnail * (step + 3 * _GAP)
    sheet = Image.new("RGB", (max(width, 7 * len(caption) + 2 * _GAP), top + rows * step + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 3), caption, fill=_INK)
    for number, tile_CHW in enumerate(tiles_PCHW):
        x, y = _GAP + number % columns * step, top + _GAP + number // columns * step
        if has_thumbnail and number == n - 1:
            x, y = columns * step + 4 * _GAP, top + _GAP
        drawn = Image.fromarray(tile_CHW.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(drawn.resize((tile, tile), Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline=_RULE)
        draw.rectangle((x, y, x + 7 * len(str(number + 1)) + 4, y + 13), fill=_PAPER)
        draw.text((x + 3, y + 1), str(number + 1), fill=_SOFT)
    return sheet


def arranged(sheets: Sequence[Image.Image]) -> Image.Image:
    """Pictures in rows, as many side by side as fit into the width of a screen."""
    places, x, y, height = [], 0, 0, 0
    for sheet in sheets:
        if x and x + sheet.width > _PAGE:
            x, y, height = 0, y + height + _CAPTION, 0
        places.append((x, y))
        x, height = x + sheet.width + _CAPTION, max(height, sheet.height)
    width = max(x + sheet.width for (x, _), sheet in zip(places, sheets, strict=True))
    page = Image.new("RGB", (width, y + height), _PAPER)
    for place, sheet in zip(places, sheets, strict=True):
        page.paste(sheet, place)
    return page
