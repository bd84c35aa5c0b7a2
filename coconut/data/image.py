"""Encoded image -> uint8 tiles, as InternVL's own image processor of transformers makes them.

    path | bytes | PIL image --open_image--> RGB, upright --ImageProcessor--> uint8 [patches, 3, H, W]

Tiles stay uint8 until they are on the device, where the model normalises them: a quarter of the bytes.
Resizing and the choice of a grid are transformers' (`GotOcr2ImageProcessor`, InternVL's); what is here is robust
decoding, the patch count of an image that is not opened, and the cutting, which writes each tile once, to where the
loader wants it (transformers' own stacks tiles in new memory).
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from coconut.types import DataError

if TYPE_CHECKING:
    import torch

    ImageLike = str | Path | bytes | Image.Image
    Room = Callable[[tuple[int, int, int, int]], torch.Tensor]  # shape -> uint8 memory of this shape

#: What Pillow may take a file for; it knows others that start programs (EPS: Ghostscript) or hold no picture.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
#: Larger images are refused: a file of some kilobytes can unpack to gigabytes.
MAX_PIXELS = 89_478_485  # 0.25 GiB of RGB, Pillow's own warning level
#: What makes a picture upright, by its EXIF orientation (tag 274); 5 to 8 lie on their side.
_ORIENTATION_TAG = 274
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION_KEYWORDS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_KEYWORD_BYTES = 80  # with the zero that ends it
_SETTINGS = ("image_size", "max_num_patches", "use_thumbnail", "dynamic_preprocess")


def open_image(image: ImageLike) -> Image.Image:
    """Decode an image to upright 8-bit RGB; of an animation, its first frame.

    Transparency is laid over white, 16-bit samples are scaled (not clipped), EXIF rotation is applied.

    Raises:
        DataError: the file is missing, empty, no image, truncated, or larger than MAX_PIXELS.
    """
    name = "image" if isinstance(image, (bytes, Image.Image)) else str(image)
    with _open(image, name) as opened:
        try:
            opened.load()
            rgb = _to_rgb(opened)
            turn = _UPRIGHT.get(_orientation(opened))  # only now: a PNG may hold its EXIF after the pixels
            return rgb if turn is None else rgb.transpose(turn)
        except Exception as error:  # decoders of hostile bytes raise anything: struct.error, IndexError, zlib.error ...
            raise DataError(f"{name} cannot be decoded: {error}") from error


def image_header(image: ImageLike) -> tuple[int, int, str]:
    """Upright width, height and the usual file suffix (``png``, ``jpg`` ...), as `open_image` makes it upright.

    Pixels are not decoded, but for a PNG whose orientation may stand after them.

    Raises:
        DataError: as `open_image`, but a truncated file goes unnoticed.
    """
    name = "image" if isinstance(image, (bytes, Image.Image)) else str(image)
    with _open(image, name) as opened:
        width, height = opened.size
        format_ = (opened.format or "png").lower()
        try:
            if isinstance(opened, PngImageFile) and _has_late_orientation(opened):
                opened.load()
        except Exception as error:  # as for decoding
            raise DataError(f"{name} cannot be decoded: {error}") from error
        # Pillow turns the size of a TIFF by itself, where a tag says so.
        turned = isinstance(opened, TiffImageFile) and _ORIENTATION_TAG in opened.tag_v2
        if not turned and _orientation(opened) >= 5:
            width, height = height, width
    return width, height, {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(format_, format_)


class ImageProcessor:
    """InternVL's dynamic tiling, to uint8.

    An image is scaled to the grid of ``image_size`` tiles (at most ``max_num_patches``) whose shape is
    nearest to its own, and cut up; a thumbnail of the whole follows when there is more than one tile.

    Args:
        image_size: side of a tile in pixels.
        max_num_patches: most tiles an image may have, the thumbnail not counted.
        use_thumbnail: whether the thumbnail is added.
        dynamic_preprocess: False scales every image to one tile.
    """

    def __init__(
        self,
        image_size: int = 448,
        max_num_patches: int = 12,
        use_thumbnail: bool = True,
        dynamic_preprocess: bool = True,
    ) -> None:
        if image_size < 1 or max_num_patches < 1:
            raise DataError(f"image_size {image_size} and max_num_patches {max_num_patches} must be at least 1")
        self.image_size = image_size
        self.max_num_patches = max_num_patches
        self.use_thumbnail = use_thumbnail
        self.dynamic_preprocess = dynamic_preprocess
        self._processor: Any = None  # made at the first image that needs it: the import takes seconds

    @classmethod
    def from_config(cls, config: Any) -> ImageProcessor:
        """From anything with attributes image_size, max_num_patches, use_thumbnail, dynamic_preprocess."""
        return cls(**{name: getattr(config, name) for name in _SETTINGS})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ImageProcessor:
        """Read what `save_pretrained` wrote, or the preprocessor_config.json of an InternVL model in -hf format."""
        path = Path(directory) / "preprocessor_config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"no image processor in {path}: {error}") from error
        size = values.get("size") or {}
        return cls(
            image_size=values.get("image_size") or (size.get("height") if isinstance(size, dict) else size) or 448,
            max_num_patches=values.get("max_num_patches", values.get("max_patches", 12)),
            use_thumbnail=values.get("use_thumbnail", True),
            dynamic_preprocess=values.get("dynamic_preprocess", values.get("crop_to_patches", True)),
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write preprocessor_config.json: transformers' keys, so that its own processor loads it, and ours."""
        path = Path(directory) / "preprocessor_config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {**self._transformers_settings(), **{name: getattr(self, name) for name in _SETTINGS}}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def process_image(self, image_path: ImageLike, room: Room | None = None) -> torch.Tensor:
        """One image, given as a path, as encoded bytes or as a PIL image, to uint8 [patches, 3, H, W].

        Args:
            image_path: the image.
            room: where the tiles go, given their shape; by default new memory.

        Raises:
            DataError: as `open_image`.
        """
        import torch

        pixels_HWC = np.asarray(open_image(image_path))
        pixels_CHW = torch.from_numpy(pixels_HWC.transpose(2, 0, 1).copy())
        height, width = pixels_CHW.shape[1:]
        columns, rows = self.grid(width, height)
        side, n_tiles = self.image_size, columns * rows
        shape = (self.num_patches(width, height), 3, side, side)
        tiles = torch.empty(shape, dtype=torch.uint8) if room is None else room(shape)
        if (width, height) == (columns * side, rows * side):
            canvas = pixels_CHW  # what resizing would return, without its fixed cost
        else:
            canvas = self._resize(pixels_CHW, columns * side, rows * side)
        grid = tiles[:n_tiles].view(rows, columns, 3, side, side)
        grid.copy_(canvas.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4))
        if len(tiles) > n_tiles:
            tiles[-1] = self._resize(pixels_CHW, side, side)
        return tiles

    def process_images(self, image_paths: list[Any]) -> torch.Tensor:
        """Several images, their tiles one after another: uint8 [patches of all, 3, H, W]."""
        import torch

        if not image_paths:
            return torch.zeros((0, 3, self.image_size, self.image_size), dtype=torch.uint8)
        return torch.cat([self.process_image(path) for path in image_paths])

    def num_patches(self, width: int, height: int) -> int:
        """Rows that an upright image of this size takes in pixel_values, thumbnail included."""
        columns, rows = self.grid(width, height)
        tiles = columns * rows
        return tiles + (1 if self.use_thumbnail and tiles > 1 else 0)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles that an upright image of this size is cut into, the thumbnail not counted."""
        max_patches = self.max_num_patches if self.dynamic_preprocess else 1
        return (1, 1) if max_patches == 1 else _best_grid(width, height, self.image_size, max_patches)

    def _transformers_settings(self) -> dict[str, Any]:
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": self.image_size, "width": self.image_size},
            "crop_to_patches": self.dynamic_preprocess,
            "min_patches": 1,
            "max_patches": self.max_num_patches,
            "resample": 3,  # bicubic
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.485, 0.456, 0.406],  # of ImageNet, as InternVL has them
            "image_std": [0.229, 0.224, 0.225],
        }

    def _resize(self, pixels_CHW: torch.Tensor, width: int, height: int) -> torch.Tensor:
        processor = self._transformers_processor()
        size = type(processor.size)(height=height, width=width)
        resized: torch.Tensor = processor.resize(pixels_CHW.unsqueeze(0), size, resample=processor.resample)
        return resized[0]

    def _transformers_processor(self) -> Any:
        if self._processor is None:
            from transformers import GotOcr2ImageProcessor

            settings = self._transformers_settings()
            del settings["image_processor_type"]
            self._processor = GotOcr2ImageProcessor(**settings)
        return self._processor


@lru_cache(maxsize=65536)
def _best_grid(width: int, height: int, image_size: int, max_patches: int) -> tuple[int, int]:
    """Columns and rows of tiles, by transformers' own rule (its cache is too small for a data set's sizes)."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas((height, width), (image_size, image_size), 1, max_patches)
    return columns, rows


def _open(image: ImageLike, name: str) -> AbstractContextManager[Image.Image]:
    """A Pillow image whose header is read and whose size is within bounds; closed afterwards if opened here."""
    if isinstance(image, Image.Image):
        return nullcontext(image)
    try:
        opened = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)
    except FileNotFoundError:
        raise DataError(f"image {name} does not exist") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is refused: {error}") from None
    except UnidentifiedImageError:
        # Pillow's own message holds the address of a buffer, another one each time.
        kind = "empty (0 bytes)" if image == b"" else f"not an image that can be read ({', '.join(FORMATS)})"
        raise DataError(f"{name} is {kind}") from None
    except Exception as error:  # as for decoding
        raise DataError(f"{name} is not an image that can be read: {error}") from None
    if opened.width * opened.height > MAX_PIXELS:
        opened.close()
        raise DataError(f"{name} is {opened.width} x {opened.height} pixels, more than {MAX_PIXELS}")
    return opened


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1, upright, where there is none or it cannot be read."""
    try:
        # Not PngImageFile's own, which decodes all pixels to look for an EXIF chunk after them.
        orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1  # a damaged note about the camera is no reason to lose the picture
    return orientation if orientation in _UPRIGHT else 1


def _has_late_orientation(png: PngImageFile) -> bool:
    """Whether a chunk after the pixels may hold an orientation; Pillow reads it only with them."""
    file = png.fp
    if file is None:  # decoded already, to its end
        return False
    place, after_pixels = file.tell(), False
    try:
        file.seek(len(_PNG_SIGNATURE))
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            after_pixels = after_pixels or kind == b"IDAT"
            keyword = file.read(min(length, _KEYWORD_BYTES)) if after_pixels and kind in _TEXT_CHUNKS else b""
            if after_pixels and (kind == b"eXIf" or keyword.startswith(_ORIENTATION_KEYWORDS)):
                return True
            file.seek(length - len(keyword) + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_wide(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey to RGB by scale; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(f"a picture of mode {image.mode} with values outside 0..65535")
    if image.mode == "F":
        full = next(full for full in (1.0, 255.0, 65535.0) if values.max(initial=0) <= full)
    else:
        full = 65535.0
    return Image.fromarray(np.round(values * (255.0 / full)).astype(np.uint8)).convert("RGB")
