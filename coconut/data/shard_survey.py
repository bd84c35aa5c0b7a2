"""The look through a data file before a shard is written: what each record takes, and every fault that shows now.

    RecordFile --sample--> Sample or Fault --stat of its images--> Survey

Images are not opened, so a million of them take as long as their directory entries do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coconut.data.record_file import RawRecord, RecordFile
from coconut.data.sample import record_from_sample, sample_from_record
from coconut.data.shard_tar import named, padded
from coconut.data.shard_writer import sample_hash
from coconut.data.workers import run_tasks
from coconut.types import DataError, Sample

_CHUNK = 2048  # records looked through in one task
Say = Callable[[str, int, int, int], None]  # (phase, tasks done, tasks, samples done)


@dataclass(frozen=True)
class Fault:
    """A record that cannot be used; the reason names it in full."""

    index: int
    key: str
    source: str
    reason: str

    def entry(self) -> dict[str, str]:
        return {"key": self.key, "reason": self.reason, "source": self.source}


@dataclass(frozen=True)
class Survey:
    """What a look through (a part of) the input finds."""

    bytes: NDArray[np.int64]  # [records], in a tar; 0 for a bad one
    key_hashes: NDArray[np.uint64]  # [records]
    faults: list[Fault]
    image_bytes: int  # of all image files
    image_stamps: str  # digest over path, size and times of each of them, in order


class Surveyor:
    """A data file and where its images are; workers inherit it when they are forked.

    Args:
        records: the data file.
        root: folder that relative paths of images start from.
        parent_paths: whether these may hold ``..``.
    """

    def __init__(self, records: RecordFile, root: Path, *, parent_paths: bool) -> None:
        self._records, self._root, self._parent_paths = records, root, parent_paths

    def survey(self, n_workers: int, say: Say) -> Survey:
        """Look through all records, in tasks of some thousand."""
        starts = range(0, len(self._records), _CHUNK)
        found: dict[int, Survey] = {}
        for start, part in run_tasks(self._survey_chunk, starts, min(n_workers, len(starts))):
            found[start] = part
            say("reading records", len(found), len(starts), min(len(found) * _CHUNK, len(self._records)))
        parts = [found[start] for start in starts]
        n_bytes = np.concatenate([part.bytes for part in parts])
        key_hashes = np.concatenate([part.key_hashes for part in parts])
        faults = [fault for part in parts for fault in part.faults]
        repeated = self._repeated_keys(key_hashes, {fault.index for fault in faults})
        n_bytes[[fault.index for fault in repeated]] = 0
        faults = sorted([*faults, *repeated], key=lambda fault: fault.index)
        total = sum(part.image_bytes for part in parts)
        stamps = hashlib.sha256("".join(part.image_stamps for part in parts).encode()).hexdigest()
        return Survey(n_bytes, key_hashes, faults, total, stamps)

    def _survey_chunk(self, start: int) -> tuple[int, Survey]:
        n = min(_CHUNK, len(self._records) - start)
        n_bytes, key_hashes = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.uint64)
        faults: list[Fault] = []
        image_bytes, stamps = 0, hashlib.sha256()
        for place, raw in enumerate(self._records.read(start, start + n)):
            sample = self.sample(raw)
            if isinstance(sample, Fault):
                faults.append(sample)
                continue
            sizes, fault = [], None
            for image in map(Path, map(str, sample.images)):
                try:
                    status = image.stat()
                    sizes.append(status.st_size)
                    stamps.update(f"{image.absolute()}\0{image_stamp(status)}\0".encode())
                except OSError:
                    fault = f"image {image} does not exist (is image_root right?)"
                    break
                if not status.st_size:
                    fault = f"image {image} is empty (0 bytes); replace it or leave the record out"
                    break
            if fault is not None:
                faults.append(_fault(sample, raw, fault))
                continue
            # The names of images are known only once they are opened; they are as long as these, or nearly.
            names = [f"{number}.png" for number in range(len(sizes))]
            text = json.dumps(record_from_sample(sample, names), ensure_ascii=False)
            n_bytes[place] = padded(len(text.encode())) + sum(map(padded, sizes))
            key_hashes[place] = sample_hash(sample.key)
            image_bytes += sum(sizes)
        return start, Survey(n_bytes, key_hashes, faults, image_bytes, stamps.hexdigest())

    def sample(self, raw: RawRecord) -> Sample | Fault:
        """The sample of a record, with paths of its images that can be opened, or what is wrong with it."""
        if raw.fault:
            return Fault(raw.index, str(raw.index), raw.where, raw.fault)
        try:
            sample = sample_from_record(raw.value, key=str(raw.index), source=raw.where, image_root=None)
        except DataError as error:
            identity = raw.value.get("id") if isinstance(raw.value, dict) else None
            reason = str(error)
            if identity is not None:
                reason = reason.replace(raw.where, f"{raw.where} (key {identity})", 1)
            return Fault(raw.index, str(raw.index if identity is None else identity), raw.where, reason)
        outside = [image for image in map(str, sample.images) if ".." in image.split("/")]
        if outside and not self._parent_paths:
            reason = f"image path {outside[0]} holds '..': set --image-root to a folder above, or allow --parent-paths"
            return _fault(sample, raw, reason)
        return dataclasses.replace(sample, images=tuple(str(self._root / str(image)) for image in sample.images))

    def _repeated_keys(self, key_hashes: NDArray[np.uint64], bad: set[int]) -> list[Fault]:
        """A fault for each record whose key an earlier one has."""
        order = np.argsort(key_hashes, kind="stable")
        same = key_hashes[order][1:] == key_hashes[order][:-1]
        suspects = sorted(set(order[1:][same].tolist() + order[:-1][same].tolist()) - bad)
        first: dict[str, str] = {}
        faults = []
        for index in suspects:
            (raw,) = self._records.read(index, index + 1)
            sample = self.sample(raw)
            assert isinstance(sample, Sample)
            if sample.key in first:
                faults.append(
                    _fault(sample, raw, f"id {sample.key!r} is that of {first[sample.key]} too; ids must be unique")
                )
            first.setdefault(sample.key, raw.where)
        return faults


def image_stamp(status: os.stat_result) -> str:
    """What tells an image file from another one, or from itself before a change, without reading it.

    Size and modification time are not enough: files that were unpacked together often share both, and one moved to
    another's name keeps them. Moving changes the time of the inode.
    """
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _fault(sample: Sample, raw: RawRecord, reason: str) -> Fault:
    return Fault(raw.index, sample.key, raw.where, f"{named(sample)}: {reason}")
