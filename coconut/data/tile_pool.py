"""Tiles from a loader process to its rank, in memory that both see and that is used again and again.

    process: tiles of each sample --room--> buffer; micro-batch --put--> buffer in use, its number travels
    rank:    number --take--> tensor on the buffer, which is free again when the last such tensor is gone

Torch's own way takes new shared memory for each batch, whose pages the kernel clears and maps one by one: for 20 MB
more time than decoding the pictures takes.
"""

from __future__ import annotations

import math
import mmap
import os
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


@dataclass
class _Filling:
    """The buffer of the micro-batch that a process works at, and how much of it is given out."""

    buffer: int
    used: int = 0


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
        self._filling: _Filling | None = None  # of this process

    def room(self, worker: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for the tiles of a sample of the next micro-batch, next to the last such; else memory of its own."""
        if self._filling is None and (free := self._free_buffers(worker)):
            self._filling = _Filling(free[0])
        filling, size = self._filling, math.prod(shape)
        if filling is None or filling.used + size > BUFFER_BYTES:
            return torch.empty(shape, dtype=torch.uint8)
        filling.used += size
        return torch.from_numpy(self._bytes(filling.buffer, size, filling.used - size)).view(shape)

    def put(self, worker: int, tiles: list[torch.Tensor]) -> PooledTiles | None:
        """Join uint8 tiles [P, 3, H, W] in a buffer of process `worker`; None without tiles, or a buffer to hold them.

        Tiles that fill their `room` without a gap are joined already; others are copied.
        """
        filling, self._filling = self._filling, None
        if not tiles:
            return None
        shape = (sum(len(some) for some in tiles), *tiles[0].shape[1:])
        if filling is not None and self._are_in_place(filling.buffer, tiles):
            buffer = filling.buffer
        else:
            free = [buffer for buffer in self._free_buffers(worker) if filling is None or buffer != filling.buffer]
            if not free or math.prod(shape) > BUFFER_BYTES:
                return None
            buffer = free[0]
            torch.cat(tiles, out=torch.from_numpy(self._bytes(buffer, math.prod(shape))).view(shape))
        self._in_use[buffer] = 1
        return PooledTiles(buffer, shape)

    def take(self, pooled: PooledTiles) -> torch.Tensor:
        """The tiles, without a copy; their buffer is free again once nothing looks at it any more."""
        array = self._bytes(pooled.buffer, math.prod(pooled.shape))
        # Torch keeps this very array as long as any tensor, view or graph uses its memory.
        weakref.finalize(array, self._free, pooled.buffer, os.getpid()).atexit = False
        return torch.from_numpy(array).view(pooled.shape)

    def _free(self, buffer: int, owner: int) -> None:
        if os.getpid() == owner:  # not a child that was forked meanwhile, and drops its copy of the tensor
            self._in_use[buffer] = 0

    def _free_buffers(self, worker: int) -> list[int]:
        first = worker * self.buffers_each
        return [buffer for buffer in range(first, first + self.buffers_each) if not self._in_use[buffer]]

    def _are_in_place(self, buffer: int, tiles: list[torch.Tensor]) -> bool:
        address: int = self._bytes(buffer, 1).ctypes.data
        for some in tiles:
            if some.data_ptr() != address:
                return False
            address += some.numel()
        return True

    def _bytes(self, buffer: int, count: int, start: int = 0) -> np.ndarray:
        return np.frombuffer(self._memory, dtype=np.uint8, count=count, offset=buffer * BUFFER_BYTES + start)
