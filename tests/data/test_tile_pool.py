"""Tiles that a process writes and another reads: the same values, and no buffer is used twice at a time."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from coconut.data import tile_pool
from coconut.data.tile_pool import TilePool


def tiles(n: int, value: int) -> torch.Tensor:
    return torch.full((n, 3, 4, 4), value, dtype=torch.uint8)


@pytest.fixture
def pool() -> TilePool:
    return TilePool(n_workers=2, buffers_each=2)


def test_what_a_process_puts_the_rank_takes(pool) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        pooled = pool.put(1, [tiles(2, 7), tiles(1, 9)])
        os.write(write, f"{pooled.buffer} {pooled.shape[0]}".encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    buffer, n = map(int, os.read(read, 100).split())
    assert (buffer, n) == (2, 3)
    taken = pool.take(tile_pool.PooledTiles(buffer, (n, 3, 4, 4)))
    assert torch.equal(taken, torch.cat([tiles(2, 7), tiles(1, 9)]))


def test_a_buffer_is_free_when_the_last_view_of_it_is_gone(pool) -> None:
    first, second = pool.put(0, [tiles(2, 1)]), pool.put(0, [tiles(2, 2)])
    assert pool.put(0, [tiles(2, 3)]) is None, "both buffers of the process are in use"
    assert pool.put(1, [tiles(2, 3)]) is not None, "the other process has its own"
    taken = pool.take(first)
    pool.take(second)
    gc.collect()
    view = taken[1:].float().requires_grad_(False)
    last = taken[1:]
    del taken
    gc.collect()
    again = pool.put(0, [tiles(2, 4)])
    assert again is not None and again.buffer == second.buffer, "the first is still looked at"
    assert last.eq(1).all() and view.eq(1).all()
    del last
    gc.collect()
    once_more = pool.put(0, [tiles(2, 5)])
    assert once_more is not None and once_more.buffer == first.buffer


def test_a_graph_keeps_its_tiles(pool) -> None:
    pooled = pool.put(0, [tiles(1, 3)])
    weight = torch.ones((), requires_grad=True)
    pixels = pool.take(pooled)
    loss = (pixels.view(-1).to(torch.uint8) * weight).sum()
    del pixels
    gc.collect()
    pool.put(0, [tiles(1, 200)])
    pool.put(0, [tiles(1, 200)])
    loss.backward()
    assert weight.grad == 3 * 3 * 4 * 4


def test_what_has_no_room_goes_another_way(pool, monkeypatch) -> None:
    monkeypatch.setattr(tile_pool, "BUFFER_BYTES", 100)
    assert pool.put(0, [tiles(3, 1)]) is None
