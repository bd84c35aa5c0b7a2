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


def fill(pool: TilePool, n: int, value: int) -> torch.Tensor:
    """As an image processor: ask for room, then write there."""
    some = pool.room(0, (n, 3, 4, 4))
    return some.fill_(value)


def test_tiles_in_the_room_they_were_given_are_not_copied(pool, monkeypatch) -> None:
    monkeypatch.setattr(torch, "cat", None)
    for value in (1, 5):  # one micro-batch after another
        pooled = pool.put(0, [fill(pool, 2, value), fill(pool, 1, value + 1)])
        assert torch.equal(pool.take(pooled)[:, 0, 0, 0], torch.tensor([value, value, value + 1]).to(torch.uint8))


def test_a_sample_that_drops_out_leaves_no_gap(pool) -> None:
    first, _, last = fill(pool, 1, 1), fill(pool, 2, 2), fill(pool, 1, 3)
    assert torch.equal(pool.take(pool.put(0, [first, last])), torch.cat([tiles(1, 1), tiles(1, 3)]))
    dropped = fill(pool, 2, 4)
    assert pool.put(0, []) is None
    assert dropped.eq(4).all()
    assert torch.equal(pool.take(pool.put(0, [fill(pool, 1, 6)])), tiles(1, 6)), "begins anew"


def test_room_beyond_the_buffers_is_memory_like_any_other(pool, monkeypatch) -> None:
    monkeypatch.setattr(tile_pool, "BUFFER_BYTES", 100)
    first, second = fill(pool, 2, 1), fill(pool, 1, 2)
    assert first.eq(1).all() and second.eq(2).all()
    assert pool.put(0, [first, second]) is None
    both = [pool.put(0, [fill(pool, 2, value)]) for value in (3, 4)]
    assert None not in both
    assert fill(pool, 2, 5).eq(5).all(), "no buffer is free"
    assert pool.take(both[0]).eq(3).all()
