"""WebDataset tars that others wrote: their samples, and an index of them that leaves the tars as they are.

    tar --headers--> groups of members with one key --read_foreign--> Sample --> IndexPart

A key is a member's path up to the first dot of its name; a sample is its consecutive members. What is read:

    json                                   a record: question, steps, answer (choices, direct_answers, id)
    question.txt, steps.txt, answer.txt    the same fields as text, one step a line, where json lacks them
    txt                                    the question, where nothing else gives one
    png jpg jpeg webp gif bmp tif tiff ppm images, also as 0.jpg, left.png ...; in the order that the record's
                                           ``image`` names, else as they come
    all else                               is left alone, never decoded

A sample's key is the record's ``id``, else TAR/KEY without ``.tar``, since keys may begin again in each tar.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import mmap
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coconut.data.image import image_header
from coconut.data.native_tar import read_native
from coconut.data.sample import sample_from_record
from coconut.data.shard_index import FOREIGN, NATIVE, IndexBuilder, IndexPart, ShardFile
from coconut.data.shard_tar import IMAGE_SUFFIXES, padded
from coconut.types import DataError, Sample

TEXT_MEMBERS = ("question.txt", "steps.txt", "answer.txt", "txt")
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)


@dataclass
class Group:
    """Consecutive members with one key."""

    key: str
    start: int  # byte of the first header
    members: list[tarfile.TarInfo] = field(default_factory=list)

    @property
    def end(self) -> int:
        last = self.members[-1]
        return last.offset_data + padded(last.size) - tarfile.BLOCKSIZE


def read_foreign(block: bytes, tar: str, where: str) -> Sample:
    """A sample from the bytes of its members.

    Raises:
        DataError: the members make no sample.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as opened:
            members = [info for info in opened if info.isfile()]
    except tarfile.TarError as error:
        raise DataError(f"{where}: broken tar header: {error}") from None
    split = [split_name(info.name) for info in members]
    if not split or split[0] is None:
        raise DataError(f"{where}: there is no sample here")
    return _sample_of_members(_contents(members, block), tar, split[0][0])


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member; None for a name without a dot or beginning with one, which WebDataset passes over."""
    match = _KEY_AND_SUFFIX.match(name)
    return (match[1], match[2].lower()) if match else None


def _sample_of_members(contents: Sequence[tuple[str, bytes]], tar: str, key: str) -> Sample:
    """A sample from (suffix, content) of its members; a DataError names tar and key."""
    where = f"{tar} (key {key})"
    repeated = [suffix for suffix, count in Counter(suffix for suffix, _ in contents).items() if count > 1]
    if repeated:
        raise DataError(f"{where}: it has two members of the kind {repeated[0]}")
    members = dict(contents)
    record = _record(members, where)
    images = [suffix for suffix in members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    named = record.get("image", record.get("images"))
    named = [named] if isinstance(named, str) else named
    if isinstance(named, list) and named and all(name in images for name in named):
        images = named
    texts = {name: value for name, value in record.items() if name not in ("image", "images")}
    sample = sample_from_record(texts, key=f"{tar.removesuffix('.tar')}/{key}", source=where)
    return dataclasses.replace(sample, source=tar, images=tuple(members[name] for name in images))


def _record(members: dict[str, bytes], where: str) -> dict[str, Any]:
    record: Any = {}
    try:
        if "json" in members:
            record = json.loads(members["json"])
        texts = {name: members[name].decode().strip() for name in TEXT_MEMBERS if name in members}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its json or txt member cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: its json member is no object with question, steps and answer")
    if not record and not texts:
        raise DataError(f"{where}: it has neither a json nor a txt member, only {', '.join(sorted(members))}")
    fields: dict[str, Any] = {name.removesuffix(".txt"): text for name, text in texts.items() if name != "txt"}
    if "steps" in fields:
        fields["steps"] = [line.strip() for line in fields["steps"].splitlines() if line.strip()]
    if "txt" in texts:
        fields.setdefault("question", texts["txt"])
    return fields | {name: value for name, value in record.items() if value is not None}


def index_tar(path: Path, *, skip_bad: bool = False) -> tuple[IndexPart, Counter[str]]:
    """Index one tar.

    Args:
        path: an uncompressed tar.
        skip_bad: leave bad samples out, and list them, instead of failing.

    Returns:
        its part of the index, and how many members of each kind are not read.

    Raises:
        DataError: naming tar and key: interleaved keys, a sample that cannot be used, a broken or cut-off tar.
    """
    builder, skipped, unread = IndexBuilder(), [], Counter[str]()
    all_native = True
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise DataError(f"{path} is empty (0 bytes); it is no tar") from None
        with content:
            groups, damage = _groups(path, content)
            if damage and not skip_bad:
                raise DataError(damage)
            runs = Counter(group.key for group in groups)
            for group in groups:
                try:
                    sample, sizes = _indexed(group, runs[group.key], content, path.name)
                    block = content[group.start : group.end]
                    all_native = all_native and _is_native(block, sample)
                    builder.add(
                        sample, sizes, offset=group.start, size=len(block), checksum=zlib.crc32(block)
                    )  # fmt: skip
                except DataError as error:
                    if not skip_bad:
                        raise
                    skipped.append({"key": group.key, "reason": str(error), "source": path.name})
                unread.update(suffix for suffix in map(_suffix, group.members) if not _is_read(suffix))
            if damage:
                skipped.append({"key": groups[-1].key if groups else "", "reason": damage, "source": path.name})
            shard = ShardFile(path.name, len(content), len(builder), hashlib.sha256(content).hexdigest())
    return builder.part(shard, skipped, NATIVE if all_native else FOREIGN), unread


def _indexed(group: Group, runs: int, content: mmap.mmap, tar: str) -> tuple[Sample, list[tuple[int, int]]]:
    where = f"{tar} (key {group.key})"
    if runs > 1:
        raise DataError(
            f"{where}: its members stand in {runs} places with other keys between (interleaved); "
            "sort the tar's members by name and index it again"
        )
    for info in group.members:
        if ".." in Path(info.name).parts:
            raise DataError(f"{where}: member name {info.name!r} holds '..'")
        if not info.isreg():
            raise DataError(f"{where}: member {info.name!r} is a link or a device, not a file")
    if group.end > len(content):
        raise DataError(f"{where}: the tar ends before member {group.members[-1].name!r} does")
    sample = _sample_of_members(_contents(group.members, content), tar, group.key)
    sizes = []
    for number, image in enumerate(sample.images):
        try:
            sizes.append(image_header(image)[:2])
        except DataError as error:
            raise DataError(f"{where}, image {number + 1}: {error}") from None
    return sample, sizes


def _is_native(block: bytes, sample: Sample) -> bool:
    """Whether the reader of our own tars makes the same sample of these bytes."""
    try:
        return read_native(block, sample.source, sample.source) == sample
    except DataError:
        return False


def _groups(path: Path, content: mmap.mmap) -> tuple[list[Group], str]:
    """Groups of a tar's members, and what is wrong with the tar as a whole."""
    groups: list[Group] = []
    damage = ""
    try:
        with tarfile.open(path, mode="r:") as opened:
            try:
                for info in opened:
                    split = None if info.isdir() else split_name(info.name)
                    if split is None:
                        continue
                    if not groups or groups[-1].key != split[0] or groups[-1].end != info.offset:
                        groups.append(Group(split[0], info.offset))
                    groups[-1].members.append(info)
            except tarfile.TarError as error:
                damage = f"{path} is cut off or broken: {error}"
            end = opened.offset
    except tarfile.TarError as error:
        return [], f"{path} is no tar, or a compressed one, which cannot be read by offset: {error}"
    if groups and groups[-1].end > len(content):
        last = groups[-1].members[-1].name
        damage = f"{path} is cut off in member {last!r} (key {groups[-1].key}); copy it again"
    elif not damage and content[end : end + tarfile.BLOCKSIZE].strip(b"\0"):
        damage = f"{path} is cut off or broken in a header at byte {end}; copy it again"
    elif not damage and len(content) < end + tarfile.BLOCKSIZE:
        damage = f"{path} lacks the zeros that end a tar: it is cut off at byte {end}; copy it again"
    return groups, damage


def _contents(members: Sequence[tarfile.TarInfo], content: Any) -> list[tuple[str, bytes]]:
    return [(_suffix(info), bytes(content[info.offset_data : info.offset_data + info.size])) for info in members]


def _suffix(info: tarfile.TarInfo) -> str:
    split = split_name(info.name)
    return split[1] if split is not None else ""


def _is_read(suffix: str) -> bool:
    return suffix == "json" or suffix in TEXT_MEMBERS or suffix.rpartition(".")[2] in IMAGE_SUFFIXES
