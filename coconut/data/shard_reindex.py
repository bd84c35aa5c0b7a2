"""An index for tars that are there already, one task a tar; the tars are only read.

DIR/*.tar --foreign_tar.index_tar, in workers--> .partial/NAME.part.npz --> index.*.npy, manifest.json in DIR
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.data.foreign_tar import index_tar
from coconut.data.shard_build import LOCK_PATIENCE_S, Built
from coconut.data.shard_index import IndexPart
from coconut.data.shard_part import load_part, part_path, save_part
from coconut.data.shard_resume import refuse_unfinished
from coconut.data.shard_survey import Say
from coconut.data.shard_writer import PARTIAL, commit_index, output_folder, sample_hash
from coconut.data.workers import run_tasks
from coconut.types import DataError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class TarDone:
    tar: str
    samples: int
    was_there: bool
    key_hashes: NDArray[np.uint64]
    unread: Counter[str]  # members of each kind that are not read


def index_shards(
    directory: str | Path, *, skip_bad: bool = False, n_workers: int = 1, say: Say = lambda *_: None
) -> tuple[Built, Counter[str]]:
    """Index the tars of a folder.

    Returns:
        what was done, and how many members of each kind are not read.

    Raises:
        DataError: no tars, compressed ones, an unfinished run's, a sample that cannot be used, a key that occurs twice.
    """
    out = Path(directory)
    tars = sorted(out.glob("*.tar"))
    compressed = sorted(path.name for path in out.glob("*") if path.name.endswith(_COMPRESSED)) if out.is_dir() else []
    if compressed:
        raise DataError(f"{out / compressed[0]} is compressed and cannot be read by offset; unpack it to a .tar first")
    if not tars:
        raise DataError(f"{out} holds no .tar files to index")
    with output_folder(out, LOCK_PATIENCE_S):
        refuse_unfinished(out)
        try:
            (out / PARTIAL).mkdir(exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{out} cannot be written: {error.strerror}; link its tars into a folder of yours"
            ) from None
        done: dict[str, TarDone] = {}
        for result in run_tasks(partial(_index, skip_bad=skip_bad), tars, min(n_workers, len(tars))):
            done[result.tar] = result
            say("indexing tars", len(done), len(tars), sum(one.samples for one in done.values()))
        parts = [load_part(part_path(out / PARTIAL, tar.name)) for tar in tars]
        found = [part for part in parts if part is not None]
        assert len(found) == len(tars), "a worker said that it wrote its part"
        _refuse_repeated_keys(tars, found, [done[tar.name].key_hashes for tar in tars])
        n_samples = commit_index(out, found)
    unread = sum((one.unread for one in done.values()), Counter[str]())
    skipped = sum(len(part.skipped) for part in found)
    return Built(n_samples, len(tars), skipped, sum(one.was_there for one in done.values())), unread


def _index(tar: Path, *, skip_bad: bool) -> TarDone:
    status = tar.stat()
    fingerprint = f"{status.st_size} {status.st_mtime_ns} {skip_bad}"
    path = part_path(tar.parent / PARTIAL, tar.name)
    part, unread = load_part(path, fingerprint), Counter[str]()
    was_there = part is not None
    if part is None:
        part, unread = index_tar(tar, skip_bad=skip_bad)
        save_part(path, part, fingerprint)
    hashes = np.fromiter((sample_hash(key) for key in _keys(part)), dtype=np.uint64, count=part.lengths["rows"])
    return TarDone(tar.name, len(hashes), was_there, hashes, unread)


def _keys(part: IndexPart) -> list[str]:
    rows, text = part.arrays["rows"], part.arrays["keys"].tobytes()
    starts, counts = rows["key_start"].tolist(), rows["key_bytes"].tolist()
    return [text[start : start + count].decode() for start, count in zip(starts, counts, strict=True)]


def _refuse_repeated_keys(tars: Sequence[Path], parts: Sequence[IndexPart], hashes: Sequence[Any]) -> None:
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    suspects = values[counts > 1]
    first: dict[str, str] = {}
    for tar, part, own in zip(tars, parts, hashes, strict=True):
        if not np.isin(own, suspects).any():
            continue
        for key in (key for key in _keys(part) if np.uint64(sample_hash(key)) in suspects):
            if key in first:
                raise DataError(f"{tar.name} (key {key}): {first[key]} holds this id too; ids must be unique")
            first[key] = tar.name
