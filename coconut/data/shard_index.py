"""The index beside a set of shards: what planning and reading need to know without opening a tar.

    shard-000000.tar ...    WebDataset: members NNNNNNNNN.json, NNNNNNNNN.0.png, NNNNNNNNN.1.jpg ...
    index.rows.npy          ROW [samples], fixed size: memory-mapped, so 100 M samples cost no memory
    index.images.npy        uint32 [images, 2]: upright width and height in pixels
    index.steps.npy         uint32 [steps]: characters of each written step
    index.keys.npy          uint8 [bytes]: the keys as UTF-8, one after another
    manifest.json           names, sizes and SHA-256 of all of the above; written last

A row points into the three side arrays, which hold what varies in number. Nothing here depends on a
tokenizer or an image size: patch counts and token estimates are derived when a run is planned.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.types import DataError, Sample

FORMAT = "coconut-shards"
VERSION = 1
MANIFEST = "manifest.json"

ROW = np.dtype(
    [
        ("offset", "<u8"),  # bytes from the start of the tar to the sample's first header
        ("size", "<u8"),  # bytes of all its members, headers and padding included
        ("key_start", "<u8"),  # first byte in index.keys
        ("image_start", "<u8"),  # first row in index.images
        ("step_start", "<u8"),  # first entry in index.steps
        ("shard", "<u4"),  # position in the manifest's list of shards
        ("question_chars", "<u4"),
        ("answer_chars", "<u4"),
        ("key_bytes", "<u2"),
        ("n_images", "<u2"),
        ("n_steps", "<u2"),
    ]
)
_ROW_STRUCT = struct.Struct("<QQQQQIIIHHH")
assert _ROW_STRUCT.size == ROW.itemsize
_ARRAYS = ("rows", "images", "steps", "keys")
_LARGEST_COUNT = 65535  # of images, of steps, of bytes in a key


@dataclass(frozen=True)
class ShardFile:
    """One tar of a set, as the manifest describes it."""

    name: str
    bytes: int
    samples: int
    sha256: str


class IndexBuilder:
    """Collects rows while shards are written, some 60 bytes a sample plus its key."""

    def __init__(self) -> None:
        self._rows, self._images, self._steps, self._keys = bytearray(), bytearray(), bytearray(), bytearray()
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, sample: Sample, sizes: Sequence[tuple[int, int]], *, shard: int, offset: int, size: int) -> None:
        """Append a sample whose images have the given widths and heights.

        Raises:
            DataError: its key was used before, or it is too large for a row.
        """
        where = sample.source or sample.key
        key = sample.key.encode()
        if sample.key in self._seen:
            raise DataError(f"{where}: the key {sample.key!r} was used by an earlier sample; keys must be unique")
        for count, what in ((len(key), "bytes in its key"), (len(sizes), "images"), (len(sample.steps), "steps")):
            if count > _LARGEST_COUNT:
                raise DataError(f"{where} has {count} {what}; an index row counts to {_LARGEST_COUNT}")
        self._rows += _ROW_STRUCT.pack(
            offset,
            size,
            len(self._keys),
            len(self._images) // 8,
            len(self._steps) // 4,
            shard,
            len(sample.question),
            len(sample.answer),
            len(key),
            len(sizes),
            len(sample.steps),
        )
        self._keys += key
        self._images += b"".join(struct.pack("<II", width, height) for width, height in sizes)
        self._steps += b"".join(struct.pack("<I", len(step)) for step in sample.steps)
        self._seen.add(sample.key)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The index's arrays by name."""
        return {
            "rows": np.frombuffer(self._rows, dtype=ROW),
            "images": np.frombuffer(self._images, dtype="<u4").reshape(-1, 2),
            "steps": np.frombuffer(self._steps, dtype="<u4"),
            "keys": np.frombuffer(self._keys, dtype=np.uint8),
        }


class ShardIndex:
    """A read-only, memory-mapped index and its manifest.

    Raises:
        DataError: no manifest (not shards, or their writing was cut short), another version, or a file
            that is missing or of another size than when it was written.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{self.directory} has no {MANIFEST}: it holds no shards, or writing them was cut short; "
                f"write them with python launch/make_shards.py DATA.json --out {self.directory}"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise DataError(f"{path} is not of format {FORMAT}, version {VERSION}; write the shards again")
        try:
            self.shards = [ShardFile(**entry) for entry in manifest["shards"]]
            self.files = {index_name(name): manifest["index"][index_name(name)] for name in _ARRAYS}
            n_samples = int(manifest["samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error!r}; write the shards again") from None
        for name, n_bytes in self.expected_bytes().items():
            if Path(name).name != name:
                raise DataError(f"{path} names {name!r}, which is not in its own folder")
            file = self.directory / name
            found = file.stat().st_size if file.is_file() else None
            if found != n_bytes:
                state = "is missing" if found is None else f"is {found} bytes long instead of {n_bytes}"
                raise DataError(f"{file} {state}; copy or write the shards again")
        # Plain arrays over the mapped files: indexing np.memmap itself is several times slower.
        arrays = {name: np.asarray(np.load(self.directory / index_name(name), mmap_mode="r")) for name in _ARRAYS}
        self.rows, self.images, self.steps, self.keys = (arrays[name] for name in _ARRAYS)
        if self.rows.dtype != ROW or len(self.rows) != n_samples:
            raise DataError(f"{self.directory}: the index does not match its manifest; write the shards again")

    def __len__(self) -> int:
        return len(self.rows)

    def expected_bytes(self) -> dict[str, int]:
        """Size of every file that the manifest names."""
        sizes = {shard.name: shard.bytes for shard in self.shards}
        return sizes | {name: entry["bytes"] for name, entry in self.files.items()}

    def expected_sha256(self) -> dict[str, str]:
        """Checksum of every file that the manifest names."""
        sums = {shard.name: shard.sha256 for shard in self.shards}
        return sums | {name: entry["sha256"] for name, entry in self.files.items()}

    def key(self, index: int) -> str:
        row = self.rows[index]
        start = int(row["key_start"])
        return self.keys[start : start + int(row["key_bytes"])].tobytes().decode()

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """Width and height of each of a sample's images."""
        row = self.rows[index]
        start = int(row["image_start"])
        return [(int(w), int(h)) for w, h in self.images[start : start + int(row["n_images"])]]

    def text_chars(self) -> NDArray[np.int64]:
        """Characters of question, steps and answer together, of every sample."""
        steps = _sums(self.steps, self.rows["step_start"], self.rows["n_steps"])
        chars: NDArray[np.int64] = self.rows["question_chars"].astype(np.int64) + self.rows["answer_chars"] + steps
        return chars

    def patches(self, num_patches: Any) -> NDArray[np.int64]:
        """Patches of every sample, where ``num_patches(width, height)`` are those of an image."""
        # A data set has far fewer sizes than images, so the rule is asked once a size.
        sizes, which = np.unique(np.asarray(self.images), axis=0, return_inverse=True)
        by_size = np.array([num_patches(int(width), int(height)) for width, height in sizes], dtype=np.int64)
        return _sums(by_size[which.reshape(-1)], self.rows["image_start"], self.rows["n_images"])


def index_name(name: str) -> str:
    return f"index.{name}.npy"


def manifest_text(shards: Sequence[ShardFile], index: dict[str, dict[str, Any]], samples: int) -> str:
    values = {
        "format": FORMAT,
        "version": VERSION,
        "samples": samples,
        "shards": [vars(shard) for shard in shards],
        "index": index,
    }
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def file_sha256(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: str | Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sums(values: NDArray[Any], starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.int64]:
    """Sum of each ragged row of ``values``; rows may be empty."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    first = starts.astype(np.int64)
    sums: NDArray[np.int64] = totals[first + counts.astype(np.int64)] - totals[first]
    return sums
