"""One shard: numbered samples -> a WebDataset tar and its part of the index.

    (number, Sample) --sample_members--> NNNNNNNNN.0.png NNNNNNNNN.1.jpg NNNNNNNNN.json --> tar + IndexPart

A member's name is the sample's number in the input, with the numbers of images in the record's ``image``. Owner and
time are fixed: the same samples give the same bytes. Images keep their own bytes unless `max_side` is given.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from coconut.data.image import image_header, open_image
from coconut.data.sample import record_from_sample
from coconut.data.shard_index import IndexBuilder, IndexPart, ShardFile
from coconut.types import DataError, Sample

#: Kinds of image that a reader decodes; nothing else goes into a shard.
IMAGE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jpeg2000"})
BLOCK = tarfile.BLOCKSIZE
_END = 2 * BLOCK  # zeros that end a tar, then filled up to a whole record
_JPEG_QUALITY = 95


def padded(n_bytes: int) -> int:
    """Bytes that a member of this size takes in a tar, its header included."""
    return BLOCK + -(-n_bytes // BLOCK) * BLOCK


def sample_members(sample: Sample, max_side: int | None = None) -> tuple[dict[str, bytes], list[tuple[int, int]]]:
    """Suffix -> content of a sample's members, and upright width and height of each image.

    Raises:
        DataError: an image that is missing, empty, none, or of a kind that is not read; the message names the sample.
    """
    members: dict[str, bytes] = {}
    sizes = []
    for number, image in enumerate(sample.images):
        try:
            content = image if isinstance(image, bytes) else Path(image).read_bytes()
            width, height, suffix = image_header(content)
            if suffix not in IMAGE_SUFFIXES:
                raise DataError(f"it is a picture of kind {suffix}, which is not read; make it a PNG or JPEG")
            if max_side is not None and max(width, height) > max_side:
                content, width, height, suffix = _shrunk(content, suffix, max_side)
        except OSError as error:
            raise DataError(f"{named(sample)}: image {image!r} cannot be read: {error.strerror}") from None
        except DataError as error:
            path = f" {image}" if isinstance(image, str) else ""
            raise DataError(f"{named(sample)}, image {number + 1}{path}: {error}") from None
        members[f"{number}.{suffix}"] = content
        sizes.append((width, height))
    record = record_from_sample(sample, members)
    members["json"] = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    return members, sizes


def named(sample: Sample) -> str:
    """A sample as errors name it."""
    return f"{sample.source or sample.key} (key {sample.key})"


class TarFile:
    """A new tar, written sample by sample; it knows its length and checksum, and is on disk when closed.

    Raises:
        DataError: the disk is full or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self._digest = hashlib.sha256()
        self._index = IndexBuilder()
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise write_fault(error, path) from None

    def __len__(self) -> int:
        return len(self._index)

    def add(self, number: int, sample: Sample, members: dict[str, bytes], sizes: list[tuple[int, int]]) -> None:
        """Append a sample's members."""
        block = bytearray()
        for suffix, content in members.items():
            block += _header(f"{number:09d}.{suffix}", len(content))
            block += content
            block += bytes(-len(content) % BLOCK)
        self._index.add(sample, sizes, offset=self.offset, size=len(block), checksum=zlib.crc32(block))
        self._write(block)

    def close(self, skipped: Iterable[dict[str, str]] = ()) -> IndexPart:
        """End the tar; without a sample, no file stays."""
        if not len(self):
            self._file.close()
            self.path.unlink()
            return self._index.part(None, skipped)
        end = self.offset + _END
        self._write(bytes(_END + -end % tarfile.RECORDSIZE))
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise write_fault(error, self.path) from None
        shard = ShardFile(self.path.name, self.offset, len(self), self._digest.hexdigest())
        return self._index.part(shard, skipped)

    def _write(self, data: bytes | bytearray) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise write_fault(error, self.path) from None
        self._digest.update(data)
        self.offset += len(data)


def write_fault(error: OSError, path: Path) -> DataError:
    """What a failed write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"the disk is full: {path} cannot be written; free space, then give the same command again")
    return DataError(f"{path} cannot be written: {error.strerror}")


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _shrunk(content: bytes, suffix: str, max_side: int) -> tuple[bytes, int, int, str]:
    """The image, upright, with its longer side `max_side`: JPEG stays JPEG, all else becomes PNG."""
    image = open_image(content)
    scale = max_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if suffix in ("jpg", "jpeg"):
        image.save(file, "JPEG", quality=_JPEG_QUALITY)
        return file.getvalue(), width, height, "jpg"
    image.save(file, "PNG")
    return file.getvalue(), width, height, "png"
