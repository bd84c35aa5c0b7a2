"""Reading shards by (shard, offset, size), and opening any kind of training data as shards.

    shard-000000.tar ... + index.*.npy + manifest.json --ShardReader--> Samples
    data.json(l) --open_dataset--> write_shards, once, into a cache --ShardReader--> Samples

`shard_index` describes the files, `shard_writer` writes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.data.foreign_tar import read_foreign
from coconut.data.image import image_header, open_image
from coconut.data.sample import read_samples, sample_from_record, summary
from coconut.data.shard_index import FOREIGN, MANIFEST, VERSION, ShardIndex, file_sha256
from coconut.data.shard_writer import locked
from coconut.data.shard_writer import write_shards as write_shards
from coconut.types import DataError, Sample

#: Only these members of a tar are ever decoded, and only like this: nothing is unpickled.
_IMAGE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jpeg2000"})
_CHARS_PER_TOKEN = 4.0  # of English text; planning needs relative costs only
_MAX_OPEN_SHARDS = 64


class ShardReader:
    """Random access to the samples of a folder of shards; safe to fork and to pickle.

    Raises:
        DataError: the folder holds no complete set (see `ShardIndex`).
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.index = ShardIndex(self.directory)
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recent first

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"])  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    @property
    def n_steps(self) -> NDArray[np.int64]:
        """Written steps of every sample."""
        return np.asarray(self.index.rows["n_steps"], dtype=np.int64)

    def key(self, index: int) -> str:
        return self.index.key(index)

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """Upright width and height of each of a sample's images, from the index."""
        return self.index.image_sizes(index)

    def costs(self, num_patches: Callable[[int, int], int], tokens_per_patch: int) -> NDArray[np.float64]:
        """Estimated tokens of every sample, image tokens included, without opening a shard."""
        patches = self.index.patches(num_patches) if len(self.index.images) else np.zeros(len(self), dtype=np.int64)
        return 1.0 + self.index.text_chars() / _CHARS_PER_TOKEN + patches * float(tokens_per_patch)

    def tail_tokens(self) -> NDArray[np.float64]:
        """Estimated tokens of every sample's steps and answer: what follows the prompt."""
        tails = self.index.text_chars() - self.index.rows["question_chars"]
        return np.asarray(tails / _CHARS_PER_TOKEN, dtype=np.float64)

    def read(self, index: int) -> Sample:
        """One sample, its images as encoded bytes.

        Raises:
            DataError: naming shard and key, when the bytes are not what the index says.
        """
        row, key = self.index.rows[index], self.key(index)
        number, size = int(row["shard"]), int(row["size"])
        shard = self.index.shards[number]
        where = f"{shard.name} (key {key})"
        block = os.pread(self._descriptor(number), size, int(row["offset"]))
        if len(block) != size:
            raise DataError(f"{where}: the shard ends {size - len(block)} bytes before the sample does")
        if self.index.layout == FOREIGN:
            sample = read_foreign(block, shard.name, where)
        else:
            sample = _sample_from_members(_members(block, where), source=shard.name, where=where)
        if sample.key != key:
            raise DataError(f"{where}: the shard holds key {sample.key!r} here; index and shard do not match")
        return sample

    def verify(self) -> int:
        """Check every file's checksum, then every sample against the index, its images decoded.

        Returns:
            the number of samples.

        Raises:
            DataError: listing the faults, the first few spelled out.
        """
        faults = [
            f"{name}: its SHA-256 is not that of the manifest"
            for name, expected in self.index.expected_sha256().items()
            if file_sha256(self.directory / name) != expected
        ]
        for index in range(len(self)):
            try:
                sample = self.read(index)
                sizes = [image_header(image)[:2] for image in sample.images]
                if sizes != self.image_sizes(index):
                    raise DataError(f"images of {sizes} pixels, in the index {self.image_sizes(index)}")
                for image in sample.images:
                    open_image(image)
            except DataError as error:
                faults.append(f"sample {index}: {error}")
        if faults:
            raise DataError(summary(f"{self.directory} has {len(faults)} faults", faults))
        return len(self)

    def _descriptor(self, shard: int) -> int:
        """An open shard. Reads name their own position (pread), so forked workers may share descriptors."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        path = self.directory / self.index.shards[shard].name
        try:
            self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path} cannot be opened: {error.strerror}") from None
        return self._open[shard]


def open_dataset(
    path: str | Path, image_root: str | Path | None = None, cache_dir: str | Path = ".cache/shards"
) -> ShardReader:
    """Open a folder of shards, or a JSON/JSONL file, which is sharded into ``cache_dir`` first.

    The cache is keyed by the file's content and by path, size and modification time of its images, so it
    is written once and a change makes a new one. Processes on one machine wait for the one that writes.

    Raises:
        DataError: the path is missing, or its data unusable.
    """
    path = Path(path)
    if path.is_dir():
        return ShardReader(path)
    samples = read_samples(path, image_root=image_root)
    cache = Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{path.stem}-{_content_key(path, samples)}"
    with locked(cache, wait=True):
        if not (target / MANIFEST).is_file():
            write_shards(samples, target)
    return ShardReader(target)


def _members(block: bytes, where: str) -> dict[str, bytes]:
    """Suffix -> content of the tar members in a block of bytes; `tarfile.open` costs ten times as much."""
    members: dict[str, bytes] = {}
    position = 0
    while position < len(block):
        try:
            header = tarfile.TarInfo.frombuf(block[position : position + 512], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(f"{where}: broken tar header at byte {position} of the sample: {error}") from None
        start = position + 512
        _, _, suffix = header.name.rpartition("/")[2].partition(".")
        members[suffix.lower()] = block[start : start + header.size]
        position = start + -(-header.size // 512) * 512
    return members


def _sample_from_members(members: dict[str, bytes], *, source: str, where: str) -> Sample:
    if "json" not in members:
        raise DataError(f"{where}: the sample has no json member, only {', '.join(sorted(members))}")
    try:
        record = json.loads(members["json"])
    except ValueError as error:
        raise DataError(f"{where}: its json member is not JSON: {error}") from None
    sample = sample_from_record(record, key="", source=source)
    images: list[bytes] = []
    for name in map(str, sample.images):
        if name not in members or name.rpartition(".")[2] not in _IMAGE_SUFFIXES:
            raise DataError(f"{where}: image member {name} is missing, or no kind of image that is read")
        images.append(members[name])
    return dataclasses.replace(sample, images=tuple(images))


def _content_key(path: Path, samples: list[Sample]) -> str:
    digest = hashlib.sha256(f"{VERSION}\0{file_sha256(path)}".encode())
    for sample in samples:
        for image in sample.images:
            status = Path(str(image)).stat()
            digest.update(f"\0{image!r}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
