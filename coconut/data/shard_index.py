"""The index beside a set of shards: what planning and reading need to know without opening a tar.

    shard-000000.tar ...    WebDataset: members NNNNNNNNN.json, NNNNNNNNN.0.png, NNNNNNNNN.1.jpg ...
    index.rows.npy          ROW [samples], fixed size: memory-mapped, so 100 M samples cost no memory
    index.images.npy        uint32 [images, 2]: upright width and height in pixels
    index.steps.npy         uint32 [steps]: characters of each written step
    index.keys.npy          uint8 [bytes]: the keys as UTF-8, one after another
    index.checksums.npy     uint32 [samples]: CRC-32 of each sample's bytes in its tar
    tokens.HASH.npy         uint32 [samples, 2], if counted: tokens by one tokenizer (`token_counts`)
    manifest.json           names, sizes and SHA-256 of all of the above; written last

A row points into the side arrays, which hold what varies in number. Nothing here depends on an image size:
patch counts are derived when a run is planned. Only the token counts, an extra, depend on a tokenizer.

The index of a set is made of *parts*, one a shard, which know nothing of each other: so shards can be made in any
order, and parts joined by appending.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.types import DataError, Sample

FORMAT = "coconut-shards"
VERSION = 1
MANIFEST = "manifest.json"
#: Whose members a set's tars hold: those that we write, or anybody's (see `foreign_tar`).
NATIVE, FOREIGN = "native", "foreign"

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
#: Type and shape of an entry of each array.
ARRAYS: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
    "rows": (ROW, ()),
    "images": (np.dtype("<u4"), (2,)),
    "steps": (np.dtype("<u4"), ()),
    "keys": (np.dtype("u1"), ()),
    "checksums": (np.dtype("<u4"), ()),
}
_REQUIRED = ("rows", "images", "steps", "keys")  # sets written earlier have no checksums of samples
_LARGEST_COUNT = 65535  # of images, of steps, of bytes in a key


@dataclass(frozen=True)
class ShardFile:
    """One tar of a set, as the manifest describes it."""

    name: str
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True)
class IndexPart:
    """What the index says of one shard, as if there were no other.

    Attributes:
        shard: the tar; None when none of its samples could be used.
        arrays: by name, see `ARRAYS`.
        lengths: of the arrays.
        skipped: samples left out, as {"key", "reason", "source"}.
        layout: NATIVE or FOREIGN.
    """

    shard: ShardFile | None
    arrays: Mapping[str, NDArray[Any]]
    lengths: Mapping[str, int]
    skipped: tuple[dict[str, str], ...] = ()
    layout: str = NATIVE


class IndexBuilder:
    """Collects the rows of one shard."""

    def __init__(self) -> None:
        self._buffers = {name: bytearray() for name in ARRAYS}

    def __len__(self) -> int:
        return len(self._buffers["rows"]) // ROW.itemsize

    def add(self, sample: Sample, sizes: Sequence[tuple[int, int]], *, offset: int, size: int, checksum: int) -> None:
        """Append a sample whose images have the given widths and heights.

        Raises:
            DataError: it is too large for a row.
        """
        key, buffers = sample.key.encode(), self._buffers
        for count, what in ((len(key), "bytes in its key"), (len(sizes), "images"), (len(sample.steps), "steps")):
            if count > _LARGEST_COUNT:
                where = sample.source or sample.key
                raise DataError(f"{where} has {count} {what}; an index row counts to {_LARGEST_COUNT}")
        buffers["rows"] += _ROW_STRUCT.pack(
            offset,
            size,
            len(buffers["keys"]),
            len(buffers["images"]) // 8,
            len(buffers["steps"]) // 4,
            0,
            len(sample.question),
            len(sample.answer),
            len(key),
            len(sizes),
            len(sample.steps),
        )
        buffers["keys"] += key
        buffers["images"] += b"".join(struct.pack("<II", width, height) for width, height in sizes)
        buffers["steps"] += b"".join(struct.pack("<I", len(step)) for step in sample.steps)
        buffers["checksums"] += struct.pack("<I", checksum)

    def part(self, shard: ShardFile | None, skipped: Iterable[dict[str, str]], layout: str = NATIVE) -> IndexPart:
        """What was collected."""
        arrays = {
            name: np.frombuffer(self._buffers[name], dtype=dtype).reshape(-1, *shape)
            for name, (dtype, shape) in ARRAYS.items()
        }
        return IndexPart(shard, arrays, {name: len(array) for name, array in arrays.items()}, tuple(skipped), layout)


def shifted_rows(rows: NDArray[Any], shard: int, lengths: Mapping[str, int]) -> NDArray[Any]:
    """A part's rows as they stand in the index of the whole set, where arrays of `lengths` come before its own."""
    rows = rows.copy()
    rows["shard"] = shard
    for field, name in (("key_start", "keys"), ("image_start", "images"), ("step_start", "steps")):
        rows[field] += np.uint64(lengths[name])
    return rows


class ShardIndex:
    """A read-only, memory-mapped index and its manifest.

    Args:
        directory: folder of the shards.
        check_shards: whether every tar must be there at its full size.

    Raises:
        DataError: no manifest (not shards, or their writing was cut short), another version, or a file
            that is missing or of another size than when it was written.
    """

    def __init__(self, directory: str | Path, *, check_shards: bool = True) -> None:
        self.directory = Path(directory)
        manifest = read_manifest(self.directory)
        path = self.directory / MANIFEST
        try:
            self.shards = [ShardFile(**entry) for entry in manifest["shards"]]
            self.files = {index_name(name): manifest["index"][index_name(name)] for name in _REQUIRED}
            extra = index_name("checksums")
            self.files |= {extra: manifest["index"][extra]} if extra in manifest["index"] else {}
            self.token_files = dict(manifest.get("tokens", {}))
            self.layout: str = manifest.get("layout", NATIVE)
            n_samples = int(manifest["samples"])
            expected = self.expected_bytes()
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error!r}; {_rebuild(self.directory)}") from None
        for name, n_bytes in expected.items():
            if Path(name).name != name:
                raise DataError(f"{path} names {name!r}, which is not in its own folder")
            if not check_shards and name.endswith(".tar"):
                continue
            file = self.directory / name
            found = file.stat().st_size if file.is_file() else None
            if found != n_bytes:
                state = "is missing" if found is None else f"is {found} bytes long instead of {n_bytes}"
                mend = "copy or write the shards again" if name.endswith(".tar") else _rebuild(self.directory)
                raise DataError(f"{file} {state}; {mend}")
        # Plain arrays over the mapped files: indexing np.memmap itself is several times slower.
        arrays = {name: _mapped(self.directory / index_name(name)) for name in ARRAYS if index_name(name) in self.files}
        self.rows, self.images, self.steps, self.keys = (arrays[name] for name in _REQUIRED)
        self.checksums: NDArray[np.uint32] | None = arrays.get("checksums")
        if self.rows.dtype != ROW or len(self.rows) != n_samples:
            raise DataError(f"{self.directory}: the index does not match its manifest; {_rebuild(self.directory)}")

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """What tells this set from any other, token counts apart: SHA-256 of the checksums of tars and index."""
        sums = [shard.sha256 for shard in self.shards] + [self.files[index_name(name)]["sha256"] for name in _REQUIRED]
        return hashlib.sha256("\0".join(sums).encode()).hexdigest()

    def expected_bytes(self) -> dict[str, int]:
        """Size of every file that the manifest names."""
        sizes = {shard.name: shard.bytes for shard in self.shards}
        return sizes | {name: entry["bytes"] for name, entry in (self.files | self.token_files).items()}

    def expected_sha256(self) -> dict[str, str]:
        """Checksum of every file that the manifest names."""
        sums = {shard.name: shard.sha256 for shard in self.shards}
        return sums | {name: entry["sha256"] for name, entry in (self.files | self.token_files).items()}

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


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a set.

    Raises:
        DataError: there is none, or none of this format and version.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{directory} has no {MANIFEST}: it holds no shards, or writing them was cut short; "
            f"write them with python launch/make_shards.py DATA.json --out {directory}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}; {_rebuild(directory)}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise DataError(f"{path} is not of format {FORMAT}, version {VERSION}; {_rebuild(directory)}")
    return manifest


def manifest_text(
    shards: Sequence[ShardFile],
    index: Mapping[str, Mapping[str, Any]],
    samples: int,
    *,
    layout: str = NATIVE,
    skipped: int = 0,
    source: Mapping[str, Any] | None = None,
) -> str:
    """A manifest; `source` says what the set was made of, to know it again, `skipped` how many samples were bad."""
    values: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "layout": layout,
        "samples": samples,
        "skipped": skipped,
        "shards": [vars(shard) for shard in shards],
        "index": index,
    }
    return json.dumps(values | ({"source": source} if source is not None else {}), indent=1, sort_keys=True) + "\n"


def _rebuild(directory: str | Path) -> str:
    return f"rebuild the index from the tars with python launch/make_shards.py --index-only --out {directory}"


def _mapped(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except Exception as error:  # numpy's reading of a damaged header raises anything: TokenError, SyntaxError ...
        raise DataError(f"{path} is damaged: {error}; {_rebuild(path.parent)}") from None


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
