"""Checks a folder of shards against its index and manifest, to the last byte, and names every difference.

manifest -> sizes and SHA-256 of every file -> each tar, in workers: headers and CRC-32 of every sample,
            bytes that no sample accounts for, key, texts and image sizes as indexed, every image decoded
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from coconut.data.foreign_tar import read_foreign
from coconut.data.image import image_header, open_image
from coconut.data.shard_index import MANIFEST, NATIVE, ShardIndex, file_sha256
from coconut.data.shard_survey import Say
from coconut.data.shard_tar import BLOCK
from coconut.data.workers import run_tasks
from coconut.types import DataError


def verify_shards(directory: str | Path, *, n_workers: int = 1, say: Say = lambda *_: None) -> list[str]:
    """Check everything.

    Returns:
        a line for each difference, which names the shard and, where one is concerned, the key; none if all is well.

    Raises:
        DataError: there is no manifest to check against.
    """
    directory = Path(directory)
    try:
        index = ShardIndex(directory, check_shards=False)
    except DataError as error:
        if not (directory / MANIFEST).is_file():
            raise
        return [str(error)]
    differences = [
        f"{name}: its SHA-256 is not that of the manifest"
        for name, sha256 in index.expected_sha256().items()
        if not name.endswith(".tar") and file_sha256(directory / name) != sha256
    ]
    known = {shard.name for shard in index.shards}
    differences += [
        f"{path.name}: a tar that the manifest does not name"
        for path in sorted(directory.glob("*.tar"))
        if path.name not in known
    ]
    n_done = n_samples = 0
    found: dict[int, list[str]] = {}
    check = _Check(index)
    for number, lines in run_tasks(check.shard, range(len(index.shards)), min(n_workers, len(index.shards))):
        found[number] = lines
        n_done, n_samples = n_done + 1, n_samples + index.shards[number].samples
        say("verifying", n_done, len(index.shards), n_samples)
    return differences + [line for number in sorted(found) for line in found[number]]


class _Check:
    """Checks one shard after another; workers inherit it when they are forked."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.first = np.concatenate([[0], np.cumsum([shard.samples for shard in index.shards], dtype=np.int64)])

    def shard(self, number: int) -> tuple[int, list[str]]:
        return number, list(self._differences(number))

    def _differences(self, number: int) -> Iterator[str]:
        shard = self.index.shards[number]
        path = self.index.directory / shard.name
        samples = range(int(self.first[number]), min(int(self.first[number + 1]), len(self.index)))
        if not path.is_file():
            keys = f": the samples {self.index.key(samples[0])} to {self.index.key(samples[-1])}" if samples else ""
            yield f"{shard.name} is missing{keys}"
            return
        if path.stat().st_size != shard.bytes:
            yield f"{shard.name} is {path.stat().st_size} bytes long instead of {shard.bytes}"
        if file_sha256(path) != shard.sha256:
            yield f"{shard.name}: its SHA-256 is not that of the manifest"
        if not path.stat().st_size:
            return
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = 0
            for sample in samples:
                row = self.index.rows[sample]
                start, size = int(row["offset"]), int(row["size"])
                if self.index.layout == NATIVE:
                    yield from _unaccounted(shard.name, content[end:start], end)
                end = start + size
                if fault := self._sample_fault(sample, content[start:end], size, shard.name):
                    yield f"{shard.name} (key {self._key(sample)}): {fault}"
            if self.index.layout == NATIVE:
                yield from _unaccounted(shard.name, content[end:], end)

    def _key(self, sample: int) -> str:
        try:
            return self.index.key(sample)
        except UnicodeDecodeError:
            return f"of sample {sample}, unreadable"

    def _sample_fault(self, sample: int, block: bytes, size: int, tar: str) -> str:
        if len(block) != size:
            return f"the shard ends {size - len(block)} bytes before the sample does"
        if self.index.checksums is not None and zlib.crc32(block) != self.index.checksums[sample]:
            return "its bytes are not those that were written (CRC-32 differs)"
        try:
            found = read_foreign(block, tar, "its members")
            sizes = [image_header(image)[:2] for image in found.images]
            for image in found.images:
                open_image(image)
        except DataError as error:
            return str(error)
        row = self.index.rows[sample]
        start = int(row["step_start"])
        steps = self.index.steps[start : start + int(row["n_steps"])].tolist()
        facts = (found.key, len(found.question), [len(step) for step in found.steps], len(found.answer), sizes)
        indexed = (
            self._key(sample),
            int(row["question_chars"]),
            steps,
            int(row["answer_chars"]),
            self.index.image_sizes(sample),
        )
        for what, here, there in zip(
            ("key", "question's length", "lengths of steps", "answer's length", "image sizes"),
            facts,
            indexed,
            strict=True,
        ):
            if here != there:
                return f"its {what} is {here}, in the index {there}"
        return ""


def _unaccounted(tar: str, gap: bytes, position: int) -> Iterator[str]:
    """Bytes between samples or after the last that are no mere filling."""
    filled = gap.lstrip(b"\0")
    if filled:
        start = position + (len(gap) - len(filled)) // BLOCK * BLOCK
        name = gap[start - position :][:100].split(b"\0")[0].decode(errors="replace")
        yield f"{tar}: a member that no sample of the index has, {name!r} at byte {start}"
