"""Parts of an index on disk: what a killed run finds again, and what it trusts.

    .partial/shard-000000.part.npz    written after its tar is on disk, whole or not at all (renamed)

A part names the *fingerprint* of all that its shard was made of, and the tar's checksum: it counts only while both
hold.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.data.shard_index import ARRAYS, IndexPart, ShardFile, file_sha256, fsync_path
from coconut.data.shard_tar import write_fault


def part_path(folder: Path, tar: str) -> Path:
    return folder / f"{tar.removesuffix('.tar')}.part.npz"


def save_part(path: Path, part: IndexPart, fingerprint: str) -> None:
    """Write a part whose tar is on disk already.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    meta = {
        "fingerprint": fingerprint,
        "shard": vars(part.shard) if part.shard is not None else None,
        "lengths": dict(part.lengths),
        "skipped": list(part.skipped),
        "layout": part.layout,
    }
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            text = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
            np.savez(file, allow_pickle=False, meta=text, **part.arrays)
        fsync_path(temporary)
        temporary.rename(path)
    except OSError as error:
        raise write_fault(error, path) from None


def load_part(path: Path, fingerprint: str | None = None) -> IndexPart | None:
    """A saved part with its arrays left on disk; None if there is none, or not with this fingerprint."""
    try:
        with np.load(path) as file:
            meta = json.loads(file["meta"].tobytes())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    if fingerprint not in (None, meta["fingerprint"]):
        return None
    shard = ShardFile(**meta["shard"]) if meta["shard"] is not None else None
    return IndexPart(shard, _ArraysOnDisk(path), meta["lengths"], tuple(meta["skipped"]), meta["layout"])


def is_whole(tar: Path, shard: ShardFile) -> bool:
    """Whether a tar is, byte for byte, the one that was written."""
    return tar.is_file() and tar.stat().st_size == shard.bytes and file_sha256(tar) == shard.sha256


class _ArraysOnDisk(Mapping[str, NDArray[Any]]):
    """A part's arrays, read when asked for: the parts of a large set together would not fit into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getitem__(self, name: str) -> NDArray[Any]:
        with np.load(self._path) as file:
            return file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ARRAYS)

    def __len__(self) -> int:
        return len(ARRAYS)
