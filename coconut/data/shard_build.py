"""A data file -> a folder of shards, in several processes; a killed run goes on with the shards that are whole.

    RecordFile --look through, in parts--> bytes and key of every record, and every fault that needs no image opened
               --cut by size--> tasks, one a shard --workers--> .partial/shard-NNNNNN.tar + its part --> commit

Which records a shard holds follows from the sizes of records and image files alone, so neither the number of workers
nor where a run was killed changes a byte of the result.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.data.record_file import RawRecord, RecordFile
from coconut.data.sample import record_from_sample, sample_from_record, summary
from coconut.data.shard_index import MANIFEST, file_sha256, read_manifest
from coconut.data.shard_part import is_whole, load_part, part_path, save_part
from coconut.data.shard_tar import TarFile, named, padded, sample_members
from coconut.data.shard_writer import (
    PARTIAL,
    commit,
    locked,
    output_folder,
    sample_hash,
    shard_bytes,
    shard_name,
    write_manifest,
)
from coconut.data.workers import run_tasks
from coconut.types import DataError, Sample

_CHUNK = 2048  # records looked through in one task
LOCK_PATIENCE_S = 3.0  # the workers of a killed run end by themselves, but not in the same instant
Say = Callable[[str, int, int, int], None]  # (phase, tasks done, tasks, samples done)


@dataclass(frozen=True)
class BuildOptions:
    """What decides the bytes of a set, besides its input.

    Attributes:
        shard_size_mb: size of a tar, at most, in units of 10^6 bytes.
        max_side: larger images are encoded anew with this longer side, in pixels; None keeps all.
        skip_bad: leave bad records out, and list them, instead of failing.
        parent_paths: allow ``..`` in the paths of images.
    """

    shard_size_mb: float
    max_side: int | None = None
    skip_bad: bool = False
    parent_paths: bool = False


@dataclass(frozen=True)
class Built:
    """What `build_shards` did."""

    samples: int
    shards: int
    skipped: int
    kept: int  # shards that an earlier run had finished
    was_complete: bool = False
    is_share: bool = False  # other processes have not made theirs yet


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
    newest_ns: int  # modification time of the newest of them


@dataclass(frozen=True)
class ShardTask:
    """A shard to be made of the records first .. last - 1, without those that are known to be bad."""

    number: int
    first: int
    last: int
    bad: tuple[Fault, ...]


@dataclass(frozen=True)
class ShardDone:
    samples: int
    was_there: bool
    skipped: int
    faults: tuple[Fault, ...]  # bad images; without skip_bad, the first one


def build_shards(
    data: str | Path,
    out: str | Path,
    options: BuildOptions,
    *,
    image_root: str | Path | None = None,
    n_workers: int = 1,
    force: bool = False,
    share: tuple[int, int] | None = None,
    say: Say = lambda *_: None,
) -> Built:
    """Make the shards of a data file, or go on making them.

    Args:
        data: JSON or JSONL.
        out: folder of the shards.
        image_root: folder of the images; None is that of the data file.
        n_workers: processes; the bytes of the result do not depend on it.
        force: replace a set that was made from other input; not with `share`.
        share: (i, n) with 0 <= i < n: make every n-th shard only, from the i-th on; n such calls, at once or one after
            the other, on any machines, make the set, and the last one to end completes it.
        say: told of progress.

    Raises:
        DataError: bad input, unless it is to be skipped; `out` holds something else; the disk is full.
    """
    records, out = RecordFile(data), Path(out)
    root = Path(image_root) if image_root is not None else Path(data).parent
    limit = shard_bytes(options.shard_size_mb)
    if options.max_side is not None and options.max_side < 1:
        raise DataError(f"max side is {options.max_side} pixels; it must be at least 1")
    if not len(records):
        raise DataError(f"{data} holds zero samples")
    builder = _Builder(records, root, out, options)
    with output_folder(out, LOCK_PATIENCE_S, shared=share is not None):
        survey = builder.survey(n_workers, say)
        source = {
            "data_sha256": file_sha256(data),
            "image_bytes": survey.image_bytes,
            "options": {name: value for name, value in vars(options).items() if name != "parent_paths"},
        }
        if not force and (complete := _is_complete(out, source, survey.newest_ns)) is not None:
            if share is None:
                shutil.rmtree(out / PARTIAL, ignore_errors=True)
            return complete
        if survey.faults and not options.skip_bad:
            reasons = [fault.reason for fault in survey.faults]
            raise DataError(summary(f"{data} has {len(reasons)} faults", reasons))
        tasks = list(_tasks(survey, limit))
        if share is None:
            _prepare_partial(out, source, force=force)
            return builder.build(tasks, source, n_workers, say)
        _join_partial(out, source)
        mine = builder.make(tasks[share[0] :: share[1]], n_workers, say)
    if not builder.has_parts(tasks):
        return dataclasses.replace(mine, is_share=True)
    # The last one: others wait here for each other, and find the set complete.
    with locked(out, wait=True):
        return _is_complete(out, source, survey.newest_ns) or builder.build(tasks, source, n_workers, say)


class _Builder:
    """The input and where the output goes; workers inherit it when they are forked."""

    def __init__(self, records: RecordFile, root: Path, out: Path, options: BuildOptions) -> None:
        self.records, self.root, self.out, self.options = records, root, out, options

    # -- the look through --

    def survey(self, n_workers: int, say: Say) -> Survey:
        """Look through all records."""
        starts = range(0, len(self.records), _CHUNK)
        found: dict[int, Survey] = {}
        for start, part in run_tasks(self._survey_chunk, starts, min(n_workers, len(starts))):
            found[start] = part
            say("reading records", len(found), len(starts), min(len(found) * _CHUNK, len(self.records)))
        parts = [found[start] for start in starts]
        n_bytes = np.concatenate([part.bytes for part in parts])
        key_hashes = np.concatenate([part.key_hashes for part in parts])
        faults = [fault for part in parts for fault in part.faults]
        repeated = self._repeated_keys(key_hashes, {fault.index for fault in faults})
        n_bytes[[fault.index for fault in repeated]] = 0
        faults = sorted([*faults, *repeated], key=lambda fault: fault.index)
        total = sum(part.image_bytes for part in parts)
        return Survey(n_bytes, key_hashes, faults, total, max(part.newest_ns for part in parts))

    def _survey_chunk(self, start: int) -> tuple[int, Survey]:
        n = min(_CHUNK, len(self.records) - start)
        n_bytes, key_hashes = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.uint64)
        faults: list[Fault] = []
        image_bytes, newest_ns = 0, 0
        for place, raw in enumerate(self.records.read(start, start + n)):
            sample = self._sample(raw)
            if isinstance(sample, Fault):
                faults.append(sample)
                continue
            sizes, fault = [], None
            for image in map(str, sample.images):
                try:
                    status = Path(image).stat()
                    sizes.append(status.st_size)
                    newest_ns = max(newest_ns, status.st_mtime_ns)
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
        return start, Survey(n_bytes, key_hashes, faults, image_bytes, newest_ns)

    def _sample(self, raw: RawRecord) -> Sample | Fault:
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
        if outside and not self.options.parent_paths:
            reason = f"image path {outside[0]} holds '..': set --image-root to a folder above, or allow --parent-paths"
            return _fault(sample, raw, reason)
        return dataclasses.replace(sample, images=tuple(str(self.root / str(image)) for image in sample.images))

    def _repeated_keys(self, key_hashes: NDArray[np.uint64], bad: set[int]) -> list[Fault]:
        """A fault for each record whose key an earlier one has."""
        order = np.argsort(key_hashes, kind="stable")
        same = key_hashes[order][1:] == key_hashes[order][:-1]
        suspects = sorted(set(order[1:][same].tolist() + order[:-1][same].tolist()) - bad)
        first: dict[str, str] = {}
        faults = []
        for index in suspects:
            (raw,) = self.records.read(index, index + 1)
            sample = self._sample(raw)
            assert isinstance(sample, Sample)
            if sample.key in first:
                faults.append(
                    _fault(sample, raw, f"id {sample.key!r} is that of {first[sample.key]} too; ids must be unique")
                )
            first.setdefault(sample.key, raw.where)
        return faults

    # -- the shards --

    def build(self, tasks: list[ShardTask], source: dict[str, Any], n_workers: int, say: Say) -> Built:
        """Make every shard that is not there yet, then the set of them."""
        made = self.make(tasks, n_workers, say)
        folder = self.out / PARTIAL
        parts = [load_part(part_path(folder, shard_name(task.number))) for task in tasks]
        found = [part for part in parts if part is not None]
        assert len(found) == len(tasks), "a worker said that it wrote its part"
        n_samples = commit(self.out, found, source)
        for left_over in self.out.glob(f"{PARTIAL}-*"):  # of a process that was killed while it began
            shutil.rmtree(left_over, ignore_errors=True)
        return Built(n_samples, sum(part.shard is not None for part in found), made.skipped, made.kept)

    def make(self, tasks: list[ShardTask], n_workers: int, say: Say) -> Built:
        """Make those of the shards that are not there yet."""
        done: list[ShardDone] = []
        for result in run_tasks(self.make_shard, tasks, min(n_workers, len(tasks))):
            if result.faults and not self.options.skip_bad:
                raise DataError(result.faults[0].reason)
            done.append(result)
            say("writing shards", len(done), len(tasks), sum(one.samples for one in done))
        n_shards, n_kept = sum(one.samples > 0 for one in done), sum(one.was_there for one in done)
        return Built(sum(one.samples for one in done), n_shards, sum(one.skipped for one in done), n_kept)

    def has_parts(self, tasks: list[ShardTask]) -> bool:
        """Whether every shard was made, by anyone."""
        return all(part_path(self.out / PARTIAL, shard_name(task.number)).is_file() for task in tasks)

    def make_shard(self, task: ShardTask) -> ShardDone:
        """Write one shard and its part, unless both are there."""
        folder, name = self.out / PARTIAL, shard_name(task.number)
        bad = {fault.index for fault in task.bad}
        samples = [(raw, self._sample(raw)) for raw in self.records.read(task.first, task.last) if raw.index not in bad]
        good = [(raw, sample) for raw, sample in samples if isinstance(sample, Sample)]
        fingerprint = self._fingerprint(task, [sample for _, sample in good])
        part = load_part(part_path(folder, name), fingerprint)
        # A run that was killed in its last moments may have moved the tar to its place.
        if part is not None and (
            part.shard is None or is_whole(folder / name, part.shard) or is_whole(self.out / name, part.shard)
        ):
            return ShardDone(part.lengths["rows"], True, len(part.skipped), ())
        part_path(folder, name).unlink(missing_ok=True)
        tar = TarFile(folder / name)
        faults: list[Fault] = []
        for raw, sample in good:
            try:
                members, sizes = sample_members(sample, self.options.max_side)
            except DataError as error:
                faults.append(Fault(raw.index, sample.key, raw.where, str(error)))
                if not self.options.skip_bad:
                    break
                continue
            tar.add(raw.index, sample, members, sizes)
        skipped = sorted([*task.bad, *faults], key=lambda fault: fault.index)
        part = tar.close(fault.entry() for fault in skipped)
        if not faults or self.options.skip_bad:
            save_part(part_path(folder, name), part, fingerprint)
        return ShardDone(part.lengths["rows"], False, len(skipped), tuple(faults))

    def _fingerprint(self, task: ShardTask, samples: Sequence[Sample]) -> str:
        """Of all that decides a shard's bytes: texts, image files by size and time, and options."""
        digest = hashlib.sha256(repr((task.number, self.options.max_side, task.bad)).encode())
        for sample in samples:
            digest.update(json.dumps(record_from_sample(sample), sort_keys=True).encode())
            for image in sample.images:
                status = Path(str(image)).stat()
                digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}".encode())
        return digest.hexdigest()


def _fault(sample: Sample, raw: RawRecord, reason: str) -> Fault:
    return Fault(raw.index, sample.key, raw.where, f"{named(sample)}: {reason}")


def _tasks(survey: Survey, limit: int) -> Iterator[ShardTask]:
    """Cut the records into shards of at most `limit` bytes each, or one sample."""
    ends = np.cumsum(survey.bytes)
    position = np.array([fault.index for fault in survey.faults], dtype=np.int64)
    first, number, n_records = 0, 0, len(ends)
    while first < n_records:
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + limit, side="right"))
        # At least one sample, however large: the first record with any bytes.
        last = max(last, int(np.searchsorted(ends, before, side="right")) + 1)
        last = min(last, n_records)
        low, high = np.searchsorted(position, [first, last])
        yield ShardTask(number, first, last, tuple(survey.faults[low:high]))
        first, number = last, number + 1


def _is_complete(out: Path, source: dict[str, Any], newest_ns: int) -> Built | None:
    """What is there, when it is a whole set of just this input; DataError when it is something else."""
    if not (out / MANIFEST).is_file():
        # Not those of an unfinished run, whose last act may have been to move some of them here.
        if any(out.glob("*.tar")) and not (out / PARTIAL / MANIFEST).is_file():
            raise DataError(
                f"{out} holds tars but no {MANIFEST}: index them with --index-only, choose another --out, "
                "or replace them with --force"
            )
        return None
    manifest = read_manifest(out)
    made_of = manifest.get("source")
    if made_of != source:
        what = "other input or options" if made_of is not None else "input that is not known"
        raise DataError(f"{out} holds shards made from {what}; choose another --out, or replace them with --force")
    files = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    files |= {name: entry["bytes"] for name, entry in manifest["index"].items()}
    is_there = all((out / name).is_file() and (out / name).stat().st_size == size for name, size in files.items())
    if not is_there or newest_ns > (out / MANIFEST).stat().st_mtime_ns:
        return None  # damaged, or an image was changed since: made anew from the same data file
    return Built(manifest["samples"], len(manifest["shards"]), manifest["skipped"], 0, was_complete=True)


def _prepare_partial(out: Path, source: dict[str, Any], *, force: bool) -> None:
    """Begin, or go on with, the folder of unfinished work."""
    if force or not _is_ours(out, source):
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        _begin_partial(out, source)


def _join_partial(out: Path, source: dict[str, Any]) -> None:
    """The same for one of several processes: of those that begin it at once, one wins."""
    if not _is_ours(out, source):
        _begin_partial(out, source)
        if not _is_ours(out, source):
            raise DataError(f"{out / PARTIAL} holds something else; choose another --out, or remove it")


def _is_ours(out: Path, source: dict[str, Any]) -> bool:
    """Whether unfinished work of this input is there; DataError when it is of another."""
    try:
        found = json.loads((out / PARTIAL / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        found = None
    if found != _identity(source):
        raise DataError(
            f"{out / PARTIAL} holds an unfinished run of other input or options; give its command again to finish it, "
            "choose another --out, or give it up with --force"
        )
    return True


def _begin_partial(out: Path, source: dict[str, Any]) -> None:
    """A new folder with its note in it, at once; nothing where there is a folder already."""
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}-", dir=out))
        fresh.chmod(0o755)
        write_manifest(fresh, json.dumps(_identity(source)))
        try:
            fresh.rename(out / PARTIAL)
        except OSError as error:
            shutil.rmtree(fresh)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        raise DataError(f"{out / PARTIAL} cannot be written: {error.strerror}") from None


def _identity(source: dict[str, Any]) -> dict[str, Any]:
    return {name: source[name] for name in ("data_sha256", "options")}
