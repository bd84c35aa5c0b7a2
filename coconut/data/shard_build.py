"""A data file -> a folder of shards, in several processes; a killed run goes on with the shards that are whole.

    RecordFile --shard_survey--> bytes and key of every record, and every fault that needs no image opened
               --cut by size--> tasks, one a shard --workers--> .partial/shard-NNNNNN.tar + its part --> commit

Which records a shard holds follows from the sizes of records and image files alone, so neither the number of workers
nor where a run was killed changes a byte of the result. `shard_resume` knows what a run finds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coconut.data.record_file import RecordFile
from coconut.data.sample import record_from_sample, summary
from coconut.data.shard_index import file_sha256
from coconut.data.shard_part import is_whole, load_part, part_path, save_part
from coconut.data.shard_resume import complete_manifest, join_partial, prepare_partial
from coconut.data.shard_survey import Fault, Say, Survey, Surveyor, image_stamp
from coconut.data.shard_tar import TarFile, sample_members
from coconut.data.shard_writer import PARTIAL, commit, locked, output_folder, shard_bytes, shard_name
from coconut.data.workers import run_tasks
from coconut.types import DataError, Sample

LOCK_PATIENCE_S = 3.0  # the workers of a killed run end by themselves, but not in the same instant


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
        force: make the set anew, in the place of whatever is there once it is whole; not with `share`.
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
    surveyor = Surveyor(records, root, parent_paths=options.parent_paths)
    builder = _Builder(records, surveyor, out, options)
    with output_folder(out, LOCK_PATIENCE_S, shared=share is not None):
        survey = surveyor.survey(n_workers, say)
        source = {
            "data_sha256": file_sha256(data),
            "image_bytes": survey.image_bytes,
            "options": {name: value for name, value in vars(options).items() if name != "parent_paths"},
        }
        if not force and (manifest := complete_manifest(out, source, survey.image_stamps)) is not None:
            if share is None:
                shutil.rmtree(out / PARTIAL, ignore_errors=True)
            return _found(manifest)
        if survey.faults and not options.skip_bad:
            reasons = [fault.reason for fault in survey.faults]
            raise DataError(summary(f"{data} has {len(reasons)} faults", reasons))
        tasks = list(_tasks(survey, limit))
        if share is None:
            prepare_partial(out, source, force=force)
            return builder.build(tasks, source, survey.image_stamps, n_workers, say)
        join_partial(out, source)
        mine = builder.make(tasks[share[0] :: share[1]], n_workers, say)
    if not builder.has_parts(tasks):
        return dataclasses.replace(mine, is_share=True)
    # The last one: others wait here for each other, and find the set complete.
    with locked(out, wait=True):
        manifest = complete_manifest(out, source, survey.image_stamps)
        if manifest is not None:
            return _found(manifest)
        return builder.build(tasks, source, survey.image_stamps, n_workers, say)


class _Builder:
    """The input and where the output goes; workers inherit it when they are forked."""

    def __init__(self, records: RecordFile, surveyor: Surveyor, out: Path, options: BuildOptions) -> None:
        self.records, self.surveyor, self.out, self.options = records, surveyor, out, options

    def build(
        self, tasks: list[ShardTask], source: dict[str, Any], image_stamps: str, n_workers: int, say: Say
    ) -> Built:
        """Make every shard that is not there yet, then the set of them."""
        made = self.make(tasks, n_workers, say)
        folder = self.out / PARTIAL
        parts = [load_part(part_path(folder, shard_name(task.number))) for task in tasks]
        found = [part for part in parts if part is not None]
        assert len(found) == len(tasks), "a worker said that it wrote its part"
        n_samples = commit(self.out, found, source, image_stamps)
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
        samples = [
            (raw, self.surveyor.sample(raw)) for raw in self.records.read(task.first, task.last) if raw.index not in bad
        ]
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
        """Of all that decides a shard's bytes: texts, image files by path, size and times, and options."""
        digest = hashlib.sha256(repr((task.number, self.options.max_side, task.bad)).encode())
        for sample in samples:
            digest.update(json.dumps(record_from_sample(sample), sort_keys=True).encode())
            for image in sample.images:
                digest.update(f"\0{image_stamp(Path(str(image)).stat())}".encode())
        return digest.hexdigest()


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


def _found(manifest: dict[str, Any]) -> Built:
    return Built(manifest["samples"], len(manifest["shards"]), manifest["skipped"], 0, was_complete=True)
