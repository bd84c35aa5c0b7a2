"""Decoding of all kinds of pictures, and tiles equal to those of transformers' own processor."""

from __future__ import annotations

import io
import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from transformers import AutoImageProcessor, GotOcr2ImageProcessor

from coconut.data import image as image_module
from coconut.data.image import ImageProcessor, image_header, open_image
from coconut.types import DataError

XMP = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def save(picture: Image.Image, fmt: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, fmt, **options)
    return file.getvalue()


def reference(picture: Image.Image, size: int, max_patches: int, dynamic: bool = True) -> torch.Tensor:
    processor = GotOcr2ImageProcessor(
        size={"height": size, "width": size}, crop_to_patches=dynamic, max_patches=max_patches
    )
    out = processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt")
    return out["pixel_values"]


SIZES = [
    (1, 1), (5, 300), (300, 5), (28, 28), (29, 28), (56, 28), (28, 56), (57, 85), (84, 84), (100, 40), (64, 48),
    (33, 120), (200, 199), (320, 240), (240, 320), (17, 171), (112, 28), (140, 84), (150, 50), (90, 31),
]  # fmt: skip


@pytest.mark.parametrize("max_patches", [1, 4, 12])
def test_tiles_equal_those_of_transformers(picture, max_patches: int) -> None:
    processor = ImageProcessor(image_size=28, max_num_patches=max_patches)
    for number, (width, height) in enumerate(SIZES):
        content = picture(width, height, seed=number)
        tiles = processor.process_image(content)
        assert tiles.dtype == torch.uint8
        expected = reference(Image.open(io.BytesIO(content)), 28, max_patches)
        assert torch.equal(tiles, expected.to(torch.uint8)), (width, height)
        assert processor.num_patches(width, height) == len(tiles)


def test_patch_counts_equal_those_of_transformers_for_many_sizes() -> None:
    ours = ImageProcessor(image_size=448, max_num_patches=12)
    theirs = GotOcr2ImageProcessor(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12)
    sizes = np.random.default_rng(0).integers(1, 3000, size=(500, 2)).tolist()
    for width, height in sizes:
        assert ours.num_patches(width, height) == theirs.get_number_of_image_patches(height, width), (width, height)


def test_without_thumbnail_and_without_tiling(picture) -> None:
    content = picture(90, 31)
    with_thumbnail = ImageProcessor(28, 6).process_image(content)
    assert torch.equal(ImageProcessor(28, 6, use_thumbnail=False).process_image(content), with_thumbnail[:-1])
    whole = ImageProcessor(28, 6, dynamic_preprocess=False)
    assert torch.equal(whole.process_image(content), with_thumbnail[-1:])
    assert whole.num_patches(90, 31) == 1
    assert ImageProcessor(28, 6, use_thumbnail=False).num_patches(90, 31) == len(with_thumbnail) - 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_picture_of_tile_size_takes_the_short_cut_and_is_the_same(picture, monkeypatch, dynamic: bool) -> None:
    content = picture(28, 28)
    expected = reference(Image.open(io.BytesIO(content)), 28, 12, dynamic).to(torch.uint8)
    processor = ImageProcessor(28, 12, dynamic_preprocess=dynamic)
    monkeypatch.setattr(processor, "_resize", lambda *_: pytest.fail("the slow path was taken"))
    assert torch.equal(processor.process_image(content), expected)


def test_path_bytes_and_picture_give_the_same(tmp_path, picture) -> None:
    content = picture(60, 30)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    processor = ImageProcessor(28, 4)
    opened = Image.open(path)
    from_path = processor.process_image(path)
    assert torch.equal(from_path, processor.process_image(str(path)))
    assert torch.equal(from_path, processor.process_image(content))
    assert torch.equal(from_path, processor.process_image(opened))
    assert torch.equal(from_path, processor.process_image(opened))  # and the picture is left usable
    both = processor.process_images([content, picture(28, 28)])
    assert torch.equal(both[:-1], from_path)
    assert both.shape == (4, 3, 28, 28)
    assert processor.process_images([]).shape == (0, 3, 28, 28)


def test_colour_modes() -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    assert np.asarray(open_image(red.convert("CMYK"))).mean(axis=(0, 1)).tolist() == pytest.approx([200, 30, 40])
    assert open_image(save(red.convert("P", palette=Image.Palette.ADAPTIVE))).getpixel((0, 0)) == (200, 30, 40)
    assert open_image(save(Image.new("L", (8, 8), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert open_image(save(Image.new("1", (8, 8), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))[0] > 250


def test_transparency_is_white() -> None:
    half = open_image(save(Image.new("RGBA", (8, 8), (200, 0, 0, 128)))).getpixel((0, 0))
    assert half == pytest.approx((227, 127, 127), abs=1)
    assert open_image(save(Image.new("LA", (8, 8), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    keyed = Image.new("P", (8, 8), 1)
    keyed.putpalette([0, 0, 0, 9, 9, 9])
    assert open_image(save(keyed, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    decoded = np.asarray(open_image(save(Image.fromarray(ramp))))
    assert decoded[..., 0].ravel().tolist() == list(range(256))
    unit = Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16))
    assert np.asarray(open_image(save(unit, "TIFF")))[..., 1].ravel().tolist() == list(range(256))


def test_first_frame_of_an_animation(picture) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    animated = save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(animated).getpixel((0, 0)) == (255, 0, 0)


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def orientation_notes() -> dict[str, bytes]:
    """Chunks of a PNG that say "turn by a quarter", in the three forms that Pillow heeds, and one that says nothing."""
    exif = Image.Exif()
    exif[274] = 6
    raw = f"\nexif\n{len(exif.tobytes()):8d}\n{exif.tobytes().hex()}".encode()
    return {
        "exif": chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        "date": chunk(b"tEXt", b"date:create\0today"),
    }


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
@pytest.mark.parametrize("note", orientation_notes())
def test_a_png_is_indexed_as_it_is_decoded_wherever_its_orientation_stands(note: str, place: str, monkeypatch) -> None:
    content = save(Image.new("RGB", (30, 20)))
    cut = 33 if place == "before the pixels" else len(content) - 12  # after the header chunk; before the end chunk
    content = content[:cut] + orientation_notes()[note] + content[cut:]
    expected = (30, 20) if note == "date" else (20, 30)
    assert open_image(content).size == expected
    if note == "date" or place == "before the pixels":
        monkeypatch.setattr(PngImageFile, "load", lambda _: pytest.fail("pixels were decoded for the header"))
    assert image_header(content) == (*expected, "png")


def test_of_two_orientations_the_decoder_and_the_index_take_the_same() -> None:
    content = save(Image.new("RGB", (30, 20)))
    turned = orientation_notes()["exif"]
    exif = Image.Exif()
    exif[274] = 1
    upright = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    both = content[:33] + turned + content[33:-12] + upright + content[-12:]
    assert image_header(both)[:2] == open_image(both).size == (30, 20)


@pytest.mark.parametrize(
    ("info", "size"), [({700: XMP}, (20, 30)), ({274: 6}, (20, 30)), ({274: 1, 700: XMP}, (30, 20)), ({}, (30, 20))]
)
def test_a_tiff_is_indexed_as_it_is_decoded(info: dict[int, object], size: tuple[int, int]) -> None:
    content = save(Image.new("RGB", (30, 20)), "TIFF", tiffinfo=info)
    assert image_header(content)[:2] == open_image(content).size == size


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(fmt: str, orientation: int) -> None:
    """The upright picture has a red corner at its top left, however it was stored."""
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste((255, 0, 0), (0, 0, 16, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # transpositions; 6 and 8 turn opposite ways
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    content = save(stored, fmt, exif=exif)
    decoded = open_image(content)
    assert decoded.size == (40, 24)
    assert image_header(content)[:2] == (40, 24)
    assert decoded.getpixel((4, 3))[1] < 100
    assert all(decoded.getpixel(corner)[1] > 150 for corner in ((36, 3), (4, 20), (36, 20)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, this is no picture", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "not an image|cannot be decoded"),
    ],
)
def test_broken_files_are_named(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_image(content)
    with pytest.raises(DataError, match=r"broken\.png"):
        ImageProcessor(28).process_image(path)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_an_error_not_a_grey_picture(picture, fmt: str) -> None:
    whole = picture(64, 64, fmt=fmt)
    assert image_header(whole)[:2] == (64, 64)
    with pytest.raises(DataError, match=r"cannot be decoded|not an image"):
        open_image(whole[: len(whole) * 2 // 3])


def test_missing_file_and_giant_picture(tmp_path, monkeypatch, picture) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        open_image(tmp_path / "nowhere.png")
    monkeypatch.setattr(image_module, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="28 x 28 pixels, more than 100"):
        open_image(picture(28, 28))


def test_header_knows_the_kind(picture) -> None:
    assert image_header(picture(30, 20, fmt="JPEG")) == (30, 20, "jpg")
    assert image_header(picture(30, 20)) == (30, 20, "png")


def test_saved_settings_come_back_and_transformers_reads_them_too(tmp_path) -> None:
    settings = {"image_size": 56, "max_num_patches": 5, "use_thumbnail": False, "dynamic_preprocess": False}
    processor = ImageProcessor.from_config(SimpleNamespace(**settings))
    processor.save_pretrained(tmp_path)
    again = ImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in settings} == settings
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(theirs, GotOcr2ImageProcessor)
    ours = {
        name: value for name, value in processor._transformers_processor().to_dict().items() if name not in settings
    }
    assert ours.items() <= theirs.to_dict().items()
    assert (theirs.size["height"], theirs.max_patches, theirs.crop_to_patches) == (56, 5, False)


def test_settings_of_a_published_model(tmp_path) -> None:
    published = {"size": {"height": 448, "width": 448}, "max_patches": 12, "crop_to_patches": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    processor = ImageProcessor.from_pretrained(tmp_path)
    assert (processor.image_size, processor.max_num_patches, processor.use_thumbnail) == (448, 12, True)
    with pytest.raises(DataError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(DataError, match="at least 1"):
        ImageProcessor(image_size=0)
