"""Reading shards by (shard, offset, size), and opening any kind of training data as shards.

    shard-000000.tar ... + index.*.npy + manifest.json --ShardReader--> Samples
    https://HOST/SET --open_dataset--> fetched into a cache, shard by shard (`remote`) --ShardReader--> Samples
    data.json(l) --open_dataset--> write_shards, once, into a cache --ShardReader--> Samples

`shard_index` describes the files, `shard_writer` writes them.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.config.checks import looks_remote
from coconut.data.foreign_tar import read_foreign
from coconut.data.native_tar import read_native
from coconut.data.remote import RemoteShards, open_remote
from coconut.data.sample import read_samples, summary
from coconut.data.shard_index import FOREIGN, MANIFEST, VERSION, ShardIndex, file_sha256
from coconut.data.shard_writer import locked
from coconut.data.shard_writer import write_shards as write_shards
from coconut.types import DataError, Sample, SourceError

_CHARS_PER_TOKEN = 4.0  # of English text; planning needs relative costs only
_MAX_OPEN_SHARDS = 64


class ShardReader:
    """Random access to the samples of a folder of shards; safe to fork and to pickle.

    Args:
        directory: the folder.
        allow_damage: whether a shard may have another size than when it was written; what is missing of it is an
            error when such a sample is read.
        remote: where the shards are fetched from, when they are not in the folder yet.

    Raises:
        DataError: the folder holds no complete set (see `ShardIndex`).
    """

    def __init__(
        self, directory: str | Path, *, allow_damage: bool = False, remote: RemoteShards | None = None
    ) -> None:
        self.directory = Path(directory)
        self.allow_damage, self.remote = allow_damage, remote
        self.index = ShardIndex(self.directory, check_shards=not allow_damage and remote is None)
        if remote is None:
            self._refuse_missing_shards()
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recent first

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "allow_damage": self.allow_damage, "remote": self.remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    @property
    def n_steps(self) -> NDArray[np.int64]:
        """Written steps of every sample."""
        return np.asarray(self.index.rows["n_steps"], dtype=np.int64)

    def key(self, index: int) -> str:
        return self.index.key(index)

    def locate(self, index: int) -> tuple[str, str]:
        """File name of the shard that holds a sample, and the sample's key; from the index."""
        return self.index.shards[int(self.index.rows[index]["shard"])].name, self.key(index)

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """Upright width and height of each of a sample's images, from the index."""
        return self.index.image_sizes(index)

    def costs(self, num_patches: Callable[[int, int], int], tokens_per_patch: int) -> NDArray[np.float64]:
        """Estimated tokens of every sample, image tokens included, without opening a shard."""
        patches = self.index.patches(num_patches) if len(self.index.images) else np.zeros(len(self), dtype=np.int64)
        return 1.0 + self.index.text_chars() / _CHARS_PER_TOKEN + patches * float(tokens_per_patch)

    def tail_tokens(self) -> NDArray[np.float64]:
        """Estimated tokens of every sample's steps and answer: what follows the prompt."""
        tails = self.index.text_chars() - self.index.rows["question_chars"]
        return np.asarray(tails / _CHARS_PER_TOKEN, dtype=np.float64)

    def read(self, index: int) -> Sample:
        """One sample, its images as encoded bytes.

        Raises:
            DataError: naming shard and key, when the bytes are not those that were indexed, or make no sample.
            SourceError: the disk or the server fails.
        """
        row, key = self.index.rows[index], self.key(index)
        number, size = int(row["shard"]), int(row["size"])
        shard = self.index.shards[number]
        where = f"{shard.name} (key {key})"
        try:
            block = os.pread(self._descriptor(number), size, int(row["offset"]))
        except OSError as error:  # of the disk, not of this sample
            raise SourceError(f"{where} cannot be read: {error.strerror}") from None
        if len(block) != size:
            raise DataError(f"{where}: the shard ends {size - len(block)} bytes before the sample does")
        # Ahead of everything else: a picture with a flipped bit may still decode, to something else.
        if self.index.checksums is not None and zlib.crc32(block) != self.index.checksums[index]:
            raise DataError(f"{where}: checksum: its bytes are not those that were written; write the shard again")
        sample = (read_foreign if self.index.layout == FOREIGN else read_native)(block, shard.name, where)
        if sample.key != key:
            raise DataError(f"{where}: the shard holds key {sample.key!r} here; index and shard do not match")
        return sample

    def damaged_shards(self) -> list[str]:
        """A line for each shard in the folder that has another size than the manifest says."""
        found = []
        for shard in self.index.shards:
            path = self.directory / shard.name
            if path.exists() and (size := path.stat().st_size) != shard.bytes:
                found.append(f"{path} is {size} bytes long instead of {shard.bytes}")
        return found

    def _descriptor(self, shard: int) -> int:
        """An open shard. Reads name their own position (pread), so forked workers may share descriptors."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        name = self.index.shards[shard].name
        path = self.directory / name if self.remote is None else self.remote.fetch(name)
        try:
            self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(f"{path} cannot be opened: {error.strerror}") from None
        return self._open[shard]

    def _refuse_missing_shards(self) -> None:
        missing = [shard.name for shard in self.index.shards if not (self.directory / shard.name).is_file()]
        if missing:
            lines = [f"{self.directory / name} is missing; copy or write the shards again" for name in missing]
            raise DataError(summary(f"{self.directory} lacks {len(missing)} shards", lines))


def open_dataset(
    path: str | Path,
    image_root: str | Path | None = None,
    cache_dir: str | Path = ".cache/shards",
    *,
    allow_damage: bool = False,
    allow_pipe: bool = False,
) -> ShardReader:
    """Open a folder of shards, one at a URL, or a JSON/JSONL file, which is sharded into ``cache_dir`` first.

    The cache is keyed by the file's content and by path, size and modification time of its images, so it
    is written once and a change makes a new one. Processes on one machine wait for the one that writes.

    Args:
        allow_damage: see `ShardReader`.
        allow_pipe: whether ``path`` may be ``pipe:COMMAND {name}``.

    Raises:
        DataError: the path is missing, or its data unusable.
        SourceError: a server does not answer.
    """
    if looks_remote(str(path)):
        remote = open_remote(str(path), cache_dir, allow_pipe=allow_pipe)
        return ShardReader(remote.folder, allow_damage=allow_damage, remote=remote)
    path = Path(path)
    if path.is_dir():
        return ShardReader(path, allow_damage=allow_damage)
    samples = read_samples(path, image_root=image_root)
    cache = Path(cache_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{path} is made into shards below {cache.resolve()}, which cannot be written ({error.strerror}); "
            "start from a folder where you may write"
        ) from error
    target = cache / f"{path.stem}-{_content_key(path, samples)}"
    with locked(cache, wait=True):
        if not (target / MANIFEST).is_file():
            write_shards(samples, target)
    return ShardReader(target)


def _content_key(path: Path, samples: list[Sample]) -> str:
    digest = hashlib.sha256(f"{VERSION}\0{file_sha256(path)}".encode())
    for sample in samples:
        for image in sample.images:
            status = Path(str(image)).stat()
            digest.update(f"\0{image!r}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
