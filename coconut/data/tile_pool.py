"""Tiles from a loader process to its rank, in memory that both see and that is used again and again.

    process: tiles of a micro-batch --put--> buffer in use, its number travels --take--> rank: tensor on that buffer
             buffer free <--when the last tensor on it is gone--

Torch's own way takes new shared memory for each batch, whose pages the kernel clears and maps one by one: for 20 MB
more time than decoding the pictures takes.
"""

from __future__ import annotations

import math
import mmap
import weakref
from dataclasses import dataclass

import numpy as np
import torch

#: Room of a buffer: 213 tiles of 448 x 448. Only what is used of it takes memory.
BUFFER_BYTES = 128 << 20

_MAP_NORESERVE = 0x4000  # Linux; not in Python's mmap before 3.13


@dataclass(frozen=True)
class PooledTiles:
    """Tiles that lie in a buffer: what travels in their place."""

    buffer: int
    shape: tuple[int, ...]


class TilePool:
    """Buffers of the loader processes of one rank; made before these are forked.

    Each process fills its own buffers only, and the rank alone frees them, so no lock is needed.
    """

    def __init__(self, n_workers: int, buffers_each: int) -> None:
        self.buffers_each = buffers_each
        n_buffers = n_workers * buffers_each
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, n_buffers * BUFFER_BYTES, flags)
        self._in_use = mmap.mmap(-1, n_buffers)  # a byte for each: 1 from put until the tensor of take is gone

    def put(self, worker: int, tiles: list[torch.Tensor]) -> PooledTiles | None:
        """Join uint8 tiles [P, 3, H, W] in a free buffer of process `worker`; None where none is free or has room."""
        shape = (sum(len(some) for some in tiles), *tiles[0].shape[1:])
        first = worker * self.buffers_each
        free = [buffer for buffer in range(first, first + self.buffers_each) if not self._in_use[buffer]]
        if not free or math.prod(shape) > BUFFER_BYTES:
            return None
        pooled = PooledTiles(free[0], shape)
        torch.cat(tiles, out=torch.from_numpy(self._array(pooled)).view(shape))
        self._in_use[pooled.buffer] = 1
        return pooled

    def take(self, pooled: PooledTiles) -> torch.Tensor:
        """The tiles, without a copy; their buffer is free again once nothing looks at it any more."""
        array = self._array(pooled)
        # Torch keeps this very array as long as any tensor, view or graph uses its memory.
        weakref.finalize(array, self._free, pooled.buffer).atexit = False
        return torch.from_numpy(array).view(pooled.shape)

    def _free(self, buffer: int) -> None:
        self._in_use[buffer] = 0

    def _array(self, pooled: PooledTiles) -> np.ndarray:
        count = math.prod(pooled.shape)
        return np.frombuffer(self._memory, dtype=np.uint8, count=count, offset=pooled.buffer * BUFFER_BYTES)
