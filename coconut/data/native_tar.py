"""One sample of a tar that we wrote ourselves (`shard_tar`): the bytes of its members -> Sample.

    NNNNNNNNN.0.png NNNNNNNNN.1.jpg NNNNNNNNN.json --read_native--> Sample, its images as encoded bytes

Only these members are ever decoded, and only like this: nothing is unpickled. `foreign_tar` reads tars of others.
"""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile

from coconut.data.sample import sample_from_record
from coconut.data.shard_tar import IMAGE_SUFFIXES
from coconut.types import DataError, Sample

_LONG_NAMES = frozenset({tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK})


def read_native(block: bytes, tar: str, where: str) -> Sample:
    """A sample from the bytes of its members.

    Raises:
        DataError: the members make no sample.
    """
    members = _members(block, where)
    if "json" not in members:
        raise DataError(f"{where}: the sample has no json member, only {', '.join(sorted(members))}")
    try:
        record = json.loads(members["json"], parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its json member is not JSON: {error}") from None
    sample = sample_from_record(record, key="", source=tar)
    images: list[bytes] = []
    for name in map(str, sample.images):
        if name not in members or name.rpartition(".")[2] not in IMAGE_SUFFIXES:
            raise DataError(f"{where}: image member {name} is missing, or no kind of image that is read")
        images.append(members[name])
    return dataclasses.replace(sample, images=tuple(images))


def _members(block: bytes, where: str) -> dict[str, bytes]:
    """Suffix -> content of the tar members in a block of bytes; `tarfile.open` costs ten times as much.

    Names are only told apart by, never used as paths, so ``../`` in one does no harm.
    """
    members: dict[str, bytes] = {}
    stems: set[str] = set()
    position = 0
    while position < len(block):
        try:
            header = tarfile.TarInfo.frombuf(block[position : position + 512], "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DataError(f"{where}: broken tar header at byte {position} of the sample: {error}") from None
        start, end = position + 512, position + 512 + header.size
        if header.size < 0 or end > len(block):
            raise DataError(f"{where}: member {header.name!r} goes on beyond the sample's end")
        position = start + -(-header.size // 512) * 512
        if header.type in _LONG_NAMES:
            return _members_with_long_names(block, where)
        _note_member(header, block[start:end], members, stems, where)
    return members


def _members_with_long_names(block: bytes, where: str) -> dict[str, bytes]:
    """The same for members whose names lie in headers of their own (PAX, GNU)."""
    members: dict[str, bytes] = {}
    stems: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(block + bytes(1024)), mode="r:") as tar:
            for header in tar:
                file = tar.extractfile(header) if header.isreg() else None
                _note_member(header, file.read() if file is not None else b"", members, stems, where)
    except tarfile.TarError as error:
        raise DataError(f"{where}: broken tar headers: {error}") from None
    return members


def _note_member(
    header: tarfile.TarInfo, content: bytes, members: dict[str, bytes], stems: set[str], where: str
) -> None:
    if header.isdir():
        return
    if not header.isreg():
        raise DataError(f"{where}: member {header.name!r} is a link or a device, not a file")
    folder, _, name = header.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    stems.add(f"{folder}/{stem}")
    if len(stems) > 1:
        raise DataError(f"{where}: members of another sample lie between its own ({header.name!r})")
    if suffix.lower() in members:
        raise DataError(f"{where}: there are two members {header.name!r}")
    members[suffix.lower()] = content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
