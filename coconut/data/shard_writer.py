"""Samples -> WebDataset tars and their index, deterministically and atomically.

    Samples --> .tmp-shard-000000.tar ... --> .tmp-index.*.npy --> all renamed --> manifest.json

Deterministic: the same samples give the same bytes. Atomic: everything is written under temporary names,
flushed to disk and renamed when all of it is complete, and the manifest comes last. So a run that was
killed leaves either the old set or a folder that a reader refuses, never half a set that looks whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from coconut.data.image import image_header
from coconut.data.sample import record_from_sample
from coconut.data.shard_index import (
    MANIFEST,
    IndexBuilder,
    ShardFile,
    file_sha256,
    fsync_path,
    index_name,
    manifest_text,
)
from coconut.types import DataError, Sample

DEFAULT_SHARD_MB = 64.0
#: Fixed owner and time: the same samples give the same bytes.
_TAR_OPTIONS: dict[str, Any] = {
    "user": "",
    "group": "",
    "mode": 0o644,
    "mtime": 0,
    "compress": False,
    "encoder": False,
}
_TEMPORARY = ".tmp-"


def write_shards(samples: Iterable[Sample], out_dir: str | Path, shard_size_mb: float = DEFAULT_SHARD_MB) -> int:
    """Write samples as tars of about ``shard_size_mb`` megabytes (10^6 bytes), and their index.

    Images keep their own bytes. An existing set in ``out_dir`` is replaced once the new one is complete.

    Returns:
        the number of samples.

    Raises:
        DataError: a missing or unreadable image, a repeated key, zero samples, or another writer at work.
    """
    if shard_size_mb <= 0:
        raise DataError(f"shard size is {shard_size_mb} MB; it must be above 0")
    out = Path(out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be made: {error}") from None
    with locked(out, wait=False):
        _remove(out.glob(f"{_TEMPORARY}*"))
        try:
            shards, builder = _write_tars(samples, out, int(shard_size_mb * 1e6))
            if not len(builder):
                raise DataError(f"zero samples to write to {out}")
            _commit(out, shards, builder)
        finally:
            _remove(out.glob(f"{_TEMPORARY}*"))
    return len(builder)


def _write_tars(samples: Iterable[Sample], out: Path, limit: int) -> tuple[list[ShardFile], IndexBuilder]:
    """Write all tars under temporary names."""
    from webdataset.writer import TarWriter  # here, since it imports torch

    builder = IndexBuilder()
    shards: list[ShardFile] = []
    pending = _payloads(samples)
    payload = next(pending, None)
    while payload is not None:
        name = f"shard-{len(shards):06d}.tar"
        first = len(builder)
        with _HashedFile(out / (_TEMPORARY + name)) as file, TarWriter(file, **_TAR_OPTIONS) as writer:
            while payload is not None:
                sample, members, sizes = payload
                start = writer.tarstream.offset
                if start and start + sum(map(len, members.values())) > limit:
                    break
                writer.write({"__key__": f"{len(builder):09d}", **members})
                end = writer.tarstream.offset
                builder.add(sample, sizes, shard=len(shards), offset=start, size=end - start)
                payload = next(pending, None)
        shards.append(ShardFile(name, file.n_bytes, len(builder) - first, file.digest.hexdigest()))
    return shards, builder


def _payloads(samples: Iterable[Sample]) -> Iterator[tuple[Sample, dict[str, bytes], list[tuple[int, int]]]]:
    """Each sample with its tar members and the sizes of its images."""
    for sample in samples:
        members: dict[str, bytes] = {}
        sizes = []
        for number, image in enumerate(sample.images):
            where = f"{sample.source or sample.key} (key {sample.key})"
            try:
                content = image if isinstance(image, bytes) else Path(image).read_bytes()
                width, height, suffix = image_header(content)
            except OSError as error:
                raise DataError(f"{where}: image {image!r} cannot be read: {error.strerror}") from None
            except DataError as error:
                named = f" {image}" if isinstance(image, str) else ""
                raise DataError(f"{where}, image {number + 1}{named}: {error}") from None
            members[f"{number}.{suffix}"] = content
            sizes.append((width, height))
        record = record_from_sample(sample, members)
        record["id"] = sample.key
        members["json"] = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
        yield sample, members, sizes


def _commit(out: Path, shards: list[ShardFile], builder: IndexBuilder) -> None:
    """Put the new set in the old one's place; the order is what makes it safe."""
    index: dict[str, dict[str, Any]] = {}
    for name, array in builder.arrays().items():
        temporary = out / (_TEMPORARY + index_name(name))
        np.save(temporary, array)
        fsync_path(temporary)
        index[index_name(name)] = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
    names = [shard.name for shard in shards] + list(index)
    (out / MANIFEST).unlink(missing_ok=True)
    fsync_path(out)
    for name in names:
        (out / (_TEMPORARY + name)).replace(out / name)
    _remove(stale for stale in out.glob("shard-*.tar") if stale.name not in names)
    fsync_path(out)
    temporary = out / (_TEMPORARY + MANIFEST)
    temporary.write_text(manifest_text(shards, index, len(builder)), encoding="utf-8")
    fsync_path(temporary)
    temporary.replace(out / MANIFEST)
    fsync_path(out)


class _HashedFile(io.RawIOBase):
    """A new file that knows its length and checksum, and is on disk when closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.digest = hashlib.sha256()
        self.n_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.n_bytes += len(data)
        return self._file.write(data)

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder against other writers on this machine; freed by the kernel when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DataError(f"another process is writing shards to {folder}") from None
        except OSError as error:
            # Some network file systems lock no folders; there, ranks rely on the trainer letting one go first.
            if error.errno not in (errno.EBADF, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                raise
        yield
    finally:
        os.close(descriptor)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)
