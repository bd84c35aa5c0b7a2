"""The plan carried out: a webdataset pipeline over planned samples, for one rank.

    EpochPlan --this rank's slots--> read (shard, offset, size) --> encode --> stage --> collate --> Batch
              |<------------------- webdataset DataPipeline, in 0 or more workers ------------------->|

An item of the pipeline is a micro-batch from its first stage on, since an empty one has to travel as well:
every rank yields ``ceil(slots / world)`` micro-batches a step, and those beyond the plan's slots, or without
samples, are inert. A sample that cannot be used is left out and is noted in the batch as a `BadSample`, so the
number of micro-batches never changes. Workers take turns, so the order is the same for any number of them.
The resume state is ``start_step`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import webdataset
from torch import Generator, Tensor, from_numpy
from torch.utils.data import DataLoader, get_worker_info

from coconut.data.bad_samples import EXTRA, BadSample
from coconut.data.plan import EpochPlan
from coconut.data.tile_pool import PooledTiles, TilePool
from coconut.types import Batch, DataError, Sample, SourceError

if TYPE_CHECKING:
    from coconut.data.image import Room

_PREFETCH = 2  # micro-batches that a loader process prepares ahead


class SampleSource(Protocol):
    """Random access to samples: `ShardReader`, `MultimodalDataset`."""

    def read(self, index: int) -> Sample: ...

    def locate(self, index: int) -> tuple[str, str]:
        """File and key of a sample, known without reading it."""


@dataclass(frozen=True)
class _MicroBatch:
    """A micro-batch on its way through the pipeline, and its place in the plan."""

    step: int
    slot: int
    items: list[tuple[int, Any]]  # index and what has become of it: nothing yet, then a Sample, then features
    bad: tuple[BadSample, ...] = ()


class StreamLoader:
    """The micro-batches of one rank for one epoch, in order; each iteration starts anew at ``start_step``.

    Args:
        dataset: where samples are read from.
        plan: the epoch.
        rank, world: this rank, of how many. Slot s belongs to rank s % world.
        encode: Sample, room for its tiles (see `ImageProcessor.process_image`) -> features.
        stage: features -> features with ids and labels.
        collate: features of a micro-batch -> Batch; of no features, an inert Batch.
        num_workers: processes that prepare micro-batches ahead; 0 prepares them in this one.
        start_step: optimizer steps of the epoch that are done already.

    Each Batch's ``extras`` hold its "step" and "slot", and the "bad_samples" that were left out because ``read``,
    ``encode`` or ``stage`` raised a DataError for them. A SourceError of these, or a DataError of ``collate``, is
    raised here, in one line, from a worker too.
    """

    def __init__(
        self,
        dataset: SampleSource,
        plan: EpochPlan,
        *,
        rank: int = 0,
        world: int = 1,
        encode: Callable[[Sample, Room | None], dict[str, Any]],
        stage: Callable[[dict[str, Any]], dict[str, Any]],
        collate: Callable[[Sequence[dict[str, Any]]], Batch],
        num_workers: int = 0,
        start_step: int = 0,
    ) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank is {rank} of {world}; ranks count from 0")
        if not 0 <= start_step <= len(plan):
            raise DataError(f"start_step is {start_step}, but the epoch has {len(plan)} steps")
        self.plan, self.rank, self.world, self.start_step = plan, rank, world, start_step
        self.num_workers, self._collate = num_workers, collate
        self._pool: TilePool | None = None
        self.accumulation = -(-plan.slots // world)  # micro-batches of this rank, and of any other, a step
        self.pipeline = webdataset.DataPipeline(
            self._planned,
            webdataset.map(_each(lambda index, _: dataset.read(index), dataset.locate)),
            webdataset.map(_each(lambda _, sample: stage(encode(sample, self._room())), dataset.locate)),
            webdataset.map(self._collated),
            _errors_as_items,
        )

    def __len__(self) -> int:
        return (len(self.plan) - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[Batch]:
        stream: Iterable[Any] = self.pipeline
        pool = None
        if self.num_workers > 0:
            # What waits in the queue, what is being filled (twice, where a sample drops out), and two steps: the
            # trainer still holds one while it collects the next.
            buffers_each = _PREFETCH + 3 + 2 * -(-self.accumulation // self.num_workers)
            pool = self._pool = TilePool(self.num_workers, buffers_each)
            stream = DataLoader(
                self.pipeline,
                batch_size=None,
                num_workers=self.num_workers,
                prefetch_factor=_PREFETCH,
                # The pipeline holds functions that cannot be pickled, which newer Pythons' default start would do.
                multiprocessing_context="fork" if self.num_workers else None,
                # Its own generator: starting workers must not move the process's random state.
                generator=Generator(),
            )
        for item in stream:
            if isinstance(item, DataError):
                raise type(item)(*item.args)
            if pool is not None:
                item.tensors = {name: _arrived(value, pool) for name, value in item.tensors.items()}
            yield item
            del item  # so that its buffer is free once the caller is done with it

    def _room(self) -> Room | None:
        """In a loader process, the pool's memory."""
        worker = get_worker_info()
        return partial(self._pool.room, worker.id) if worker is not None and self._pool is not None else None

    def _collated(self, micro_batch: _MicroBatch) -> Batch:
        """Collate; in a loader process the tiles go to the pool, and the collator sees none of them."""
        features = [features for _, features in micro_batch.items]
        tiles = [one["pixel_values"] for one in features if one.get("num_patches")]
        worker = get_worker_info()
        pooled = self._pool.put(worker.id, tiles) if worker is not None and self._pool is not None else None
        if pooled is not None:
            features = [
                one | {"pixel_values": one["pixel_values"][:0]} if one["num_patches"] else one for one in features
            ]
        batch = self._collate(features)
        if worker is not None:
            # Torch would open a piece of shared memory for each of these small tensors.
            batch.tensors = {name: value.numpy() for name, value in batch.tensors.items()}
        if pooled is not None:
            batch.tensors["pixel_values"] = pooled
        batch.extras |= {"step": micro_batch.step, "slot": micro_batch.slot, EXTRA: micro_batch.bad}
        return batch

    def _planned(self) -> Iterator[_MicroBatch]:
        """Source of the pipeline: the turns of this worker among this rank's micro-batches."""
        worker = get_worker_info()
        turn, n_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        position = 0
        for step in range(self.start_step, len(self.plan)):
            turns = range(position, position + self.accumulation)
            mine = [number for number in range(self.accumulation) if turns[number] % n_workers == turn]
            position += self.accumulation
            slots = self.plan.step(step) if mine else []
            for number in mine:
                slot = number * self.world + self.rank
                indices = slots[slot].tolist() if slot < len(slots) else []
                yield _MicroBatch(step, slot, [(index, None) for index in indices])


def _each(
    function: Callable[[int, Any], Any], locate: Callable[[int], tuple[str, str]]
) -> Callable[[_MicroBatch], _MicroBatch]:
    """Apply a function to each item; an item for which it raises a DataError is left out, and noted."""

    def run(batch: _MicroBatch) -> _MicroBatch:
        items, bad = [], list(batch.bad)
        for index, item in batch.items:
            try:
                items.append((index, function(index, item)))
            except SourceError:
                raise
            except DataError as error:
                bad.append(BadSample.from_error(*locate(index), error))
        return replace(batch, items=items, bad=tuple(bad))

    return run


def _arrived(value: Any, pool: TilePool) -> Tensor:
    """The tensor that a loader process sent."""
    return pool.take(value) if isinstance(value, PooledTiles) else from_numpy(value)


def _errors_as_items(stream: Iterable[Batch]) -> Iterator[Batch | DataError]:
    """Let an error end the stream as its last item: torch would wrap one raised in a worker in a traceback."""
    try:
        yield from stream
    except DataError as error:
        yield error
