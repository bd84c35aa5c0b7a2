"""Several sets of shards read as one: the indices of each set follow those of the one before it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from coconut.data.shards import ShardReader
from coconut.types import Sample


class ShardSets:
    """Random access to the samples of one or several sets; a `SampleSource`.

    Args:
        readers: the sets, by the path that names them.
        limit: use only the first so many samples of each.
    """

    def __init__(self, readers: Mapping[str, ShardReader], limit: int | None = None) -> None:
        self.readers = dict(readers)
        self.sizes = {name: min(len(reader), limit or len(reader)) for name, reader in readers.items()}
        ends = np.cumsum(list(self.sizes.values()))
        self._ends: list[int] = ends.tolist()
        self.first = dict(zip(self.sizes, [0, *self._ends[:-1]], strict=True))
        self._names = list(self.sizes)

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> tuple[str, int]:
        """Name of the set that holds a sample, and the sample's index there."""
        name = self._names[bisect_right(self._ends, index)]
        return name, index - self.first[name]

    def read(self, index: int) -> Sample:
        """See `ShardReader.read`."""
        name, inner = self.place(index)
        return self.readers[name].read(inner)

    def locate(self, index: int) -> tuple[str, str]:
        """File name of the shard (of several sets, its path, as names repeat) and key of a sample; from the index."""
        name, inner = self.place(index)
        shard, key = self.readers[name].locate(inner)
        return (shard if len(self.readers) == 1 else f"{name.rstrip('/')}/{shard}"), key

    def key(self, index: int) -> str:
        return self.locate(index)[1]

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """Upright width and height of each of a sample's images."""
        name, inner = self.place(index)
        return self.readers[name].image_sizes(inner)

    def n_steps(self) -> NDArray[np.int64]:
        """Written steps of every sample."""
        return np.concatenate([reader.n_steps[: self.sizes[name]] for name, reader in self.readers.items()])

    def patches(self, num_patches: Callable[[int, int], int]) -> NDArray[np.int64]:
        """Patches of every sample, where ``num_patches(width, height)`` are those of an image."""
        found = []
        for name, reader in self.readers.items():
            has_images = len(reader.index.images) > 0
            patches = reader.index.patches(num_patches) if has_images else np.zeros(len(reader), dtype=np.int64)
            found.append(patches[: self.sizes[name]])
        return np.concatenate(found)
