"""Samples -> a folder of shards and its index, deterministically and atomically.

    Samples --> .partial/shard-000000.tar ... --> .partial/index.*.npy --> all renamed --> manifest.json

Everything is written in a folder of its own, flushed to disk and moved when all of it is complete, and the manifest
comes last. So a run that was killed leaves either the old set or a folder that a reader refuses, never half a set that
looks whole. `shard_build` does the same from a data file, in several processes, and goes on where it was killed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from coconut.data.shard_index import (
    ARRAYS,
    FOREIGN,
    MANIFEST,
    NATIVE,
    IndexPart,
    file_sha256,
    fsync_path,
    index_name,
    manifest_text,
    shifted_rows,
)
from coconut.data.shard_tar import TarFile, padded, sample_members, write_fault
from coconut.types import DataError, Sample

DEFAULT_SHARD_MB = 64.0
PARTIAL = ".partial"
BAD_SAMPLES = "bad_samples.jsonl"
IMAGES_STAMP = "images.stamp"


def write_shards(samples: Iterable[Sample], out_dir: str | Path, shard_size_mb: float = DEFAULT_SHARD_MB) -> int:
    """Write samples as tars of about ``shard_size_mb`` megabytes (10^6 bytes), and their index.

    Images keep their own bytes. An existing set in ``out_dir`` is replaced once the new one is complete.

    Returns:
        the number of samples.

    Raises:
        DataError: a missing or unreadable image, a repeated key, zero samples, or another writer at work.
    """
    out = Path(out_dir)
    limit = shard_bytes(shard_size_mb)
    with output_folder(out):
        partial = out / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            parts = _write_tars(samples, partial, limit)
            return commit(out, parts)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def shard_bytes(shard_size_mb: float) -> int:
    """Bytes of a shard, at most (but for a sample that is larger on its own)."""
    if shard_size_mb <= 0:
        raise DataError(f"shard size is {shard_size_mb} MB; it must be above 0")
    return int(shard_size_mb * 1e6)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _write_tars(samples: Iterable[Sample], folder: Path, limit: int) -> list[IndexPart]:
    parts: list[IndexPart] = []
    tar: TarFile | None = None
    seen: set[str] = set()
    for number, sample in enumerate(samples):
        if sample.key in seen:
            where = sample.source or sample.key
            raise DataError(f"{where}: the key {sample.key!r} was used by an earlier sample; keys must be unique")
        seen.add(sample.key)
        members, sizes = sample_members(sample)
        if tar is not None and tar.offset + sum(padded(len(content)) for content in members.values()) > limit:
            parts.append(tar.close())
            tar = None
        tar = tar or TarFile(folder / shard_name(len(parts)))
        tar.add(number, sample, members, sizes)
    return parts + ([tar.close()] if tar is not None else [])


def commit(
    out: Path, parts: Sequence[IndexPart], source: Mapping[str, Any] | None = None, image_stamps: str = ""
) -> int:
    """Put a complete set, whose tars lie in ``out/.partial``, in the old one's place; the order is what makes it safe.

    A tar that a killed commit has moved already stays where it is. What `source` and `image_stamps` are for,
    `shard_resume` says.

    Returns:
        the number of samples.
    """
    n_samples = sum(part.lengths["rows"] for part in parts)
    if not n_samples:
        raise DataError(f"zero samples to write to {out}")
    partial = out / PARTIAL
    shards = [part.shard for part in parts if part.shard is not None]
    try:
        index = write_index(parts, partial)
        (out / MANIFEST).unlink(missing_ok=True)
        fsync_path(out)
        for name in [*(shard.name for shard in shards), *index]:
            if (partial / name).exists():
                (partial / name).replace(out / name)
        names = {shard.name for shard in shards}
        _remove(stale for stale in out.glob("shard-*.tar") if stale.name not in names)
        _finish(out, parts, index, source, image_stamps)
    except OSError as error:
        raise write_fault(error, out) from None
    return n_samples


def commit_index(out: Path, parts: Sequence[IndexPart]) -> int:
    """Write the index of tars that lie in `out` already; returns the number of samples."""
    n_samples = sum(part.lengths["rows"] for part in parts)
    if not n_samples:
        raise DataError(f"{out}: the tars hold zero samples that can be used")
    try:
        index = write_index(parts, out / PARTIAL)
        (out / MANIFEST).unlink(missing_ok=True)
        fsync_path(out)
        for name in index:
            (out / PARTIAL / name).replace(out / name)
        _finish(out, parts, index)
    except OSError as error:
        raise write_fault(error, out) from None
    return n_samples


def _finish(
    out: Path,
    parts: Sequence[IndexPart],
    index: Mapping[str, Any],
    source: Mapping[str, Any] | None = None,
    image_stamps: str = "",
) -> None:
    """What follows once tars and index have their names: what is written beside them, and last the manifest."""
    # Of the set that was here before.
    _remove([*out.glob("tokens.*.npy"), out / BAD_SAMPLES, out / IMAGES_STAMP])
    if image_stamps:
        (out / IMAGES_STAMP).write_text(image_stamps + "\n", encoding="utf-8")
        fsync_path(out / IMAGES_STAMP)
    skipped = [entry for part in parts for entry in part.skipped]
    if skipped:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
        (out / BAD_SAMPLES).write_text(lines, encoding="utf-8")
        fsync_path(out / BAD_SAMPLES)
    shards = [part.shard for part in parts if part.shard is not None]
    n_samples = sum(shard.samples for shard in shards)
    layout = NATIVE if all(part.layout == NATIVE for part in parts) else FOREIGN
    fsync_path(out)
    text = manifest_text(shards, index, n_samples, layout=layout, skipped=len(skipped), source=source)
    write_manifest(out, text)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def write_manifest(out: Path, text: str) -> None:
    """Put a manifest in place, whole or not at all."""
    temporary = out / f".{MANIFEST}.tmp"
    temporary.write_text(text, encoding="utf-8")
    fsync_path(temporary)
    temporary.replace(out / MANIFEST)
    fsync_path(out)


def write_index(parts: Sequence[IndexPart], folder: Path) -> dict[str, dict[str, Any]]:
    """Join parts to the arrays of a whole set, one part in memory at a time.

    Returns:
        size and checksum of each file, by its name.
    """
    totals = {name: sum(part.lengths[name] for part in parts) for name in ARRAYS}
    index: dict[str, dict[str, Any]] = {}
    for name, (dtype, shape) in ARRAYS.items():
        path = folder / index_name(name)
        before = dict.fromkeys(ARRAYS, 0)
        n_shards = 0
        with path.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, header | {"shape": (totals[name], *shape)})
            for part in parts:
                array = part.arrays[name]
                file.write((shifted_rows(array, n_shards, before) if name == "rows" else array).tobytes())
                n_shards += part.shard is not None
                before = {key: count + part.lengths[key] for key, count in before.items()}
        fsync_path(path)
        index[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return index


@contextmanager
def output_folder(out: Path, patience_s: float = 0.0, *, shared: bool = False) -> Iterator[None]:
    """Make a folder for shards and hold it against other writers (shared: but those that share it too).

    Waits `patience_s` seconds for one that is about to end.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be made: {error}") from None
    give_up = time.monotonic() + patience_s
    while True:
        held = locked(out, wait=False, shared=shared)
        try:
            held.__enter__()
            break
        except DataError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(0.1)
    try:
        yield
    finally:
        held.__exit__(None, None, None)


@contextmanager
def locked(folder: Path, *, wait: bool, shared: bool = False) -> Iterator[None]:
    """Hold a folder against other writers on this machine; freed by the kernel when the process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DataError(f"another process is writing shards to {folder}") from None
        except OSError as error:
            # Some network file systems lock no folders; there, ranks rely on the trainer letting one go first.
            if error.errno not in (errno.EBADF, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                raise
        yield
    finally:
        os.close(descriptor)


def sample_hash(key: str) -> int:
    """64 bits of a key's hash, to find repeated keys among many without holding them."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)
