"""Bad input of many kinds in one set of shards: what can be decoded is decoded rightly, the rest is left out by name.

Each case is one sample inside a shard whose index, checksums too, is right; a sound sample follows each.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coconut.data.bad_samples import bad_samples_of
from coconut.data.collate import MultimodalCollator
from coconut.data.encode import SampleEncoder
from coconut.data.image import ImageProcessor
from coconut.data.plan import make_plan
from coconut.data.shards import ShardReader, write_shards
from coconut.data.stage_text import build_prompt_template, stage_spec
from coconut.data.stream import StreamLoader
from coconut.types import Batch, DataError, Sample

SIDE = 28
MAX_LENGTH = 64
COLOUR = (200, 40, 90)


def record(**changes: Any) -> dict[str, Any]:
    values = {"id": "KEY", "question": "start a ?", "steps": ["red up b"], "answer": "green", "image": ["0.png"]}
    return {name: value for name, value in (values | changes).items() if value is not ...}


def saved(picture: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, fmt, **options)
    return file.getvalue()


def flat(colour: tuple[int, int, int] = COLOUR, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    return Image.new("RGB", size, colour)


SOUND = saved(flat())
NOISE = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)))


@dataclasses.dataclass
class Member:
    name: str
    content: bytes
    kind: bytes = tarfile.REGTYPE
    link: str = ""


def members_of(rec: Any = None, image: bytes | None = SOUND, suffix: str = "png", stem: str = "STEM") -> list[Member]:
    """The members of one sample; `rec` may be the record's bytes."""
    rec = record(image=[f"0.{suffix}"] if image is not None else ...) if rec is None else rec
    content = rec if isinstance(rec, bytes) else json.dumps(rec).encode()
    images = [Member(f"{stem}.0.{suffix}", image)] if image is not None else []
    return [*images, Member(f"{stem}.json", content)]


def block_of(members: list[Member], fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size, info.type, info.linkname = len(member.content), member.kind, member.link
            tar.addfile(info, io.BytesIO(member.content))
        end = tar.offset
    return file.getvalue()[:end]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def bomb(width: int, height: int) -> bytes:
    """A picture of some kilobytes that would unpack to gigabytes."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A small picture with a comment of 100 MB, packed."""
    packed = zlib.compress(bytes(100 << 20), 9)
    chunk = png_chunk(b"zTXt", b"Comment\0\0" + packed)
    return SOUND[:33] + chunk + SOUND[33:]


def rotated() -> bytes:
    """Stored on its side; upright, its top half is red and its bottom half blue."""
    upright = flat((255, 0, 0))
    upright.paste((0, 0, 255), (0, SIDE // 2, SIDE, SIDE))
    exif = Image.Exif()
    exif[274] = 6
    return saved(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def header_of(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def with_header(size: int) -> bytes:
    """A picture's member that claims another size than it has."""
    block = block_of(members_of())
    return header_of("STEM.0.png", size) + block[512:]


def negative_size() -> bytes:
    """A size below zero, in tar's base-256 form: a reader that trusts it goes round in circles."""
    header = bytearray(header_of("STEM.0.png", 0))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + block_of(members_of())[512:]


def grey(values: np.ndarray) -> Callable[[torch.Tensor], bool]:
    expected = torch.from_numpy(values.astype(np.uint8))
    return lambda pixels: bool((pixels[0] == expected).all())


def colour(red: int, green: int, blue: int, tolerance: int = 3) -> Callable[[torch.Tensor], bool]:
    expected = torch.tensor([red, green, blue], dtype=torch.float).view(1, 3, 1, 1)
    return lambda pixels: bool(((pixels.float() - expected).abs() <= tolerance).all())


def top_red_bottom_blue(pixels: torch.Tensor) -> bool:
    return pixels[0, :, 2, 14].tolist() == [255, 0, 0] and pixels[0, :, 25, 14].tolist() == [0, 0, 255]


RAMP = (np.arange(SIDE * SIDE, dtype=np.uint16) % 256 * 257).reshape(SIDE, SIDE)
CMYK = saved(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=95)
JPEG = saved(flat(), "JPEG", quality=95)
NOISE_JPEG = saved(Image.open(io.BytesIO(NOISE)), "JPEG", quality=95)
ANIMATED = saved(flat((255, 0, 0)), "GIF", save_all=True, append_images=[flat((0, 0, 255))])
CLEAR = Image.new("RGBA", (SIDE, SIDE), (200, 0, 0, 0))
PICKLE = b"cos\nsystem\n(S'true'\ntR."
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\nshowpage\n%%EOF\n"

#: What is decoded, and how its pixels have to look; None for a sample without a picture.
DECODED: dict[str, tuple[bytes, Callable[[torch.Tensor], bool] | None]] = {
    "cmyk jpeg": (block_of(members_of(image=CMYK, suffix="jpg")), colour(255, 0, 0, tolerance=6)),
    "16-bit grey png": (block_of(members_of(image=saved(Image.fromarray(RAMP)))), grey(RAMP // 257)),
    "animation, first frame": (block_of(members_of(image=ANIMATED, suffix="gif")), colour(255, 0, 0)),
    "exif rotation": (block_of(members_of(image=rotated())), top_red_bottom_blue),
    "transparent, over white": (block_of(members_of(image=saved(CLEAR))), colour(255, 255, 255)),
    "palette": (block_of(members_of(image=saved(flat().quantize(4)))), colour(*COLOUR)),
    "one bit": (block_of(members_of(image=saved(Image.new("1", (SIDE, SIDE), 1)))), colour(255, 255, 255)),
    "jpeg named png": (block_of(members_of(image=JPEG)), colour(*COLOUR)),
    "capital suffix": (block_of(members_of(rec=record(image=["0.jpg"]), image=JPEG, suffix="JPG")), colour(*COLOUR)),
    "one pixel": (block_of(members_of(image=saved(flat(size=(1, 1))))), colour(*COLOUR)),
    "very long and thin": (block_of(members_of(image=saved(flat(size=(3000, 2))))), colour(*COLOUR)),
    "bytes after the picture": (block_of(members_of(image=SOUND + b"trailing")), colour(*COLOUR)),
    "member name with ..": (block_of(members_of(stem="../../tmp/STEM")), colour(*COLOUR)),
    "long member name, PAX": (block_of(members_of(stem="d" * 120 + "/ü"), tarfile.PAX_FORMAT), colour(*COLOUR)),
    "long member name, GNU": (block_of(members_of(stem="d" * 120), tarfile.GNU_FORMAT), colour(*COLOUR)),
    "folder entry": (block_of([Member("STEM", b"", tarfile.DIRTYPE), *members_of()]), colour(*COLOUR)),
    "utf-8 with mark": (block_of(members_of(rec=b"\xef\xbb\xbf" + json.dumps(record()).encode())), colour(*COLOUR)),
    "utf-16": (block_of(members_of(rec=json.dumps(record()).encode("utf-16"))), colour(*COLOUR)),
    "answer is a number": (block_of(members_of(rec=record(answer=7))), colour(*COLOUR)),
    "unknown fields": (block_of(members_of(rec=record(extra={"a": [1]}))), colour(*COLOUR)),
    "no image": (block_of(members_of(image=None)), None),
    "no steps": (block_of(members_of(rec=record(steps=[]))), colour(*COLOUR)),
    "a control token as text": (block_of(members_of(rec=record(answer="<|latent|>"))), colour(*COLOUR)),
    "other members": (block_of([*members_of(), Member("STEM.pyd", PICKLE)]), colour(*COLOUR)),
}  # fmt: skip

PICTURE, RECORD = members_of()
#: What is left out, and a part of the reason.
LEFT_OUT: dict[str, tuple[bytes, str]] = {
    "broken picture": (block_of(members_of(image=NOISE[:60] + bytes(40) + NOISE[100:])), "cannot be decoded"),
    "truncated png": (block_of(members_of(image=NOISE[:-700])), "cannot be decoded"),
    "truncated jpeg": (block_of(members_of(image=NOISE_JPEG[:-80], suffix="jpg")), "cannot be decoded"),
    "zero-byte picture": (block_of(members_of(image=b"")), "empty (0 bytes)"),
    "a web page for a picture": (block_of(members_of(image=b"<html>404</html>")), "not an image that can be read"),
    "a program for a picture (EPS)": (block_of(members_of(image=EPS)), "not an image that can be read"),
    "decompression bomb": (block_of(members_of(image=bomb(60_000, 60_000))), "refused|more than"),
    "large, not yet a bomb": (block_of(members_of(image=bomb(12_000, 8_000))), "pixels, more than"),
    "bomb in a comment": (block_of(members_of(image=text_bomb())), "not an image that can be read|cannot be decoded"),
    "height of zero": (block_of(members_of(image=bomb(28, 0))), "not an image that can be read|cannot be decoded"),
    "missing picture": (block_of(members_of(rec=record(), image=None)), "0.png is missing"),
    "picture outside the tar": (block_of(members_of(rec=record(image=["../../etc/passwd"]))), "is missing"),
    "a kind that is not read": (block_of(members_of(image=PICKLE, suffix="pyd")), "no kind of image"),
    "missing record": (block_of(members_of()[:1]), "no json member"),
    "zero-byte record": (block_of(members_of(rec=b"")), "not JSON"),
    "invalid JSON": (block_of(members_of(rec=b'{"question": "start a ?", ')), "not JSON"),
    "not UTF-8": (block_of(members_of(rec=json.dumps(record()).encode().replace(b"green", b"gr\xfcn"))), "not JSON"),
    "JSON nested too deeply": (block_of(members_of(rec=b"[" * 200_000)), "not JSON"),
    "NaN": (block_of(members_of(rec=json.dumps(record(answer=float("nan"))).encode())), "NaN is no JSON value"),
    "half a surrogate pair": (block_of(members_of(rec=record(answer="\ud800"))), "half a surrogate"),
    "record is a list": (block_of(members_of(rec=b"[1, 2]")), "not a list"),
    "no question": (block_of(members_of(rec=record(question=...))), "'question' is missing"),
    "no answer": (block_of(members_of(rec=record(answer=None))), "'answer' is missing"),
    "steps are a text": (block_of(members_of(rec=record(steps="red up b"))), "'steps' must be a list"),
    "answer longer than max_length": (block_of(members_of(rec=record(answer="red " * MAX_LENGTH))), "max_length"),
    "interleaved key": (block_of([PICTURE, Member("OTHER.json", b"{}"), RECORD]), "another sample"),
    "the same member twice": (block_of([PICTURE, PICTURE, RECORD]), "two members"),
    "picture is a link": (block_of([Member("STEM.0.png", b"", tarfile.SYMTYPE, "/etc/passwd"), RECORD]), "a link"),
    "another sample's record": (block_of(members_of(rec=record(id="other"))), "holds key 'other'"),
    "member larger than the sample": (with_header(1 << 30), "beyond the sample's end"),
    "member of negative size": (negative_size(), "beyond the sample's end"),
    "broken header": (b"\xff" * 512 + block_of(members_of())[512:], "broken tar header"),
    "zeros": (bytes(2048), "broken tar header"),
}  # fmt: skip


CASES = [*DECODED, *LEFT_OUT]


def keyed(block: bytes, key: str) -> bytes:
    """The same block with the record's id, of equal length, in the place of KEY."""
    for encoding in ("utf-8", "utf-16-le"):
        block = block.replace('"KEY"'.encode(encoding), f'"{key}"'.encode(encoding))
    return block


def write_set(folder: Path, blocks: list[bytes]) -> None:
    """A sound set of shards, in whose one tar the samples' bytes are then replaced."""
    samples = [Sample(f"{number:03d}", "start a ?", ("red up b",), "green") for number in range(len(blocks))]
    write_shards(samples, folder, shard_size_mb=1000)
    sizes = np.array([len(block) for block in blocks])
    rows = np.load(folder / "index.rows.npy")
    rows["offset"], rows["size"] = np.cumsum(sizes) - sizes, sizes
    np.save(folder / "index.rows.npy", rows)
    # As if the samples had been bad when they were written: what happens to bytes afterwards, the checksum tells.
    np.save(folder / "index.checksums.npy", np.array([zlib.crc32(block) for block in blocks], dtype=np.uint32))
    tar = folder / "shard-000000.tar"
    tar.write_bytes(b"".join(blocks) + bytes(1024))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = tar.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> ShardReader:
    """All cases, a sound sample after each, and at the end one that is cut off."""
    folder = tmp_path_factory.mktemp("torture") / "shards"
    blocks = [block for name in CASES for block in ((DECODED | LEFT_OUT)[name][0], block_of(members_of()))]
    blocks.append(block_of(members_of(image=NOISE)))
    write_set(folder, [keyed(block, f"{number:03d}") for number, block in enumerate(blocks)])
    tar = folder / "shard-000000.tar"
    os.truncate(tar, tar.stat().st_size - 1024 - 700)
    return ShardReader(folder, allow_damage=True)


@pytest.fixture(scope="module", params=[0, 2])
def batches(request, reader, tokenizer, ids) -> list[Batch]:
    """One epoch, a sample a micro-batch."""
    template = build_prompt_template(tokenizer)
    encoder = SampleEncoder(tokenizer, ImageProcessor(SIDE, 1), template, 1, MAX_LENGTH)
    loader = StreamLoader(
        reader,
        make_plan(np.ones(len(reader)), seed=0, epoch=0, slots=4, samples_per_step=4, balance="none"),
        encode=encoder.encode,
        stage=partial(encoder.with_stage, spec=stage_spec(0), ids=ids),
        collate=MultimodalCollator(tokenizer, None, ids[1]).collate_batch,
        num_workers=request.param,
    )
    return list(loader)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 50 and not DECODED.keys() & LEFT_OUT.keys()


def test_every_sample_is_either_decoded_or_named_and_sound_ones_are_never_lost(reader, batches) -> None:
    good = [key for batch in batches for key in batch.keys]
    bad = [one.key for one in bad_samples_of(batches)]
    assert sorted(good + bad) == [reader.key(index) for index in range(len(reader))]
    names = {f"{2 * number:03d}": name for number, name in enumerate(CASES)} | {f"{len(reader) - 1:03d}": "cut off"}
    assert {names[key] for key in bad} == {*LEFT_OUT, "cut off"}
    assert len(batches) == 4 * -(-len(reader) // 4), "the number of micro-batches never changes"


@pytest.mark.parametrize("name", DECODED)
def test_decoded(name: str, batches) -> None:
    key, looks_right = f"{2 * CASES.index(name):03d}", DECODED[name][1]
    batch = next(batch for batch in batches if key in batch.keys)
    if looks_right is None:
        assert "pixel_values" not in batch.tensors
    else:
        assert looks_right(batch.tensors["pixel_values"])


@pytest.mark.parametrize("name", [*LEFT_OUT, "cut off"])
def test_left_out(name: str, batches, reader) -> None:
    number = 2 * CASES.index(name) if name in CASES else len(reader) - 1
    one = next(one for one in bad_samples_of(batches) if one.key == f"{number:03d}")
    expected = LEFT_OUT[name][1] if name in CASES else "the shard ends 700 bytes before the sample does"
    assert one.shard == "shard-000000.tar"
    assert any(part in one.reason for part in expected.split("|")), one.reason
    assert "object at" not in one.reason, "the same reason at every start"
    assert len(one.reason) < 400


def test_nothing_is_started_and_nothing_written_outside(tmp_path, monkeypatch, reader) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("pickle.loads", lambda *_: pytest.fail("something was unpickled"))
    processor = ImageProcessor(SIDE, 1)
    for index in range(len(reader)):
        with suppress(DataError):
            [processor.process_image(image) for image in reader.read(index).images]
    assert not list(tmp_path.iterdir())


def test_a_truncated_shard_is_refused_where_damage_is_not_allowed_and_named_where_it_is(reader) -> None:
    with pytest.raises(DataError, match=r"shard-000000\.tar is \d+ bytes long instead of \d+"):
        ShardReader(reader.directory)
    assert [line.rpartition("/")[2].split(" ")[0] for line in reader.damaged_shards()] == ["shard-000000.tar"]
