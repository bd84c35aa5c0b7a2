"""The stream: every sample once, the same steps on every rank, for any number of ranks and workers."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coconut.data.bad_samples import bad_samples_of
from coconut.data.collate import MultimodalCollator
from coconut.data.encode import SampleEncoder
from coconut.data.image import ImageProcessor
from coconut.data.plan import make_plan
from coconut.data.shards import ShardReader, write_shards
from coconut.data.stage_text import build_prompt_template, stage_spec
from coconut.data.stream import StreamLoader
from coconut.types import Batch, DataError, Sample, SourceError


@pytest.fixture(scope="module")
def reader(tmp_path_factory, make_samples) -> ShardReader:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(make_samples(23), folder, shard_size_mb=0.02)
    return ShardReader(folder)


@pytest.fixture
def encoder(tokenizer) -> SampleEncoder:
    return SampleEncoder(tokenizer, ImageProcessor(28, 1), build_prompt_template(tokenizer), 1)


@pytest.fixture
def loader(reader, tokenizer, ids, encoder):
    collator = MultimodalCollator(tokenizer, None, ids[1])

    def make(*, slots: int = 4, samples_per_step: int = 8, **options) -> StreamLoader:
        costs = reader.costs(encoder.image_processor.num_patches, 1)
        options = {
            "plan": make_plan(costs, seed=1, epoch=0, slots=slots, samples_per_step=samples_per_step),
            "dataset": reader,
            "encode": encoder.encode,
            "stage": partial(encoder.with_stage, spec=stage_spec(1, c_thought=2), ids=ids),
            "collate": collator.collate_batch,
        } | options
        return StreamLoader(**options)

    return make


def steps_of(loaders) -> dict[int, list[tuple[int, tuple[str, ...]]]]:
    """step -> its non-empty slots with their keys, over all ranks."""
    steps = defaultdict(list)
    for loader in loaders:
        for batch in loader:
            steps[batch.extras["step"]].append((batch.extras["slot"], batch.keys))
    return {step: sorted(pair for pair in found if pair[1]) for step, found in steps.items()}


def test_every_sample_once_and_the_same_steps_for_any_number_of_ranks(loader, reader) -> None:
    expected = steps_of([loader()])
    keys = Counter(key for slots in expected.values() for _, row in slots for key in row)
    assert keys == {reader.key(i): 1 for i in range(23)}
    for world in (2, 3, 4, 8, 64):
        loaders = [loader(rank=rank, world=world) for rank in range(world)]
        lengths = {len(list(one)) for one in loaders}
        assert lengths == {len(loaders[0])}, "ranks differ in their number of micro-batches"
        assert loaders[0].accumulation == -(-4 // world)
        assert steps_of(loaders) == expected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(loader, num_workers: int) -> None:
    alone = list(loader(rank=1, world=2))
    shared = list(loader(rank=1, world=2, num_workers=num_workers))
    assert [batch.keys for batch in shared] == [batch.keys for batch in alone]
    assert [batch.extras for batch in shared] == [batch.extras for batch in alone]
    for mine, theirs in zip(shared, alone, strict=True):
        assert mine.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(mine.tensors[name], theirs.tensors[name]) for name in mine.tensors)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_later_gives_the_rest(loader, num_workers: int) -> None:
    whole = [batch.keys for batch in loader(slots=3)]
    late = loader(slots=3, start_step=1, num_workers=num_workers)
    assert len(late) == len(whole) - 3
    assert [batch.keys for batch in late] == whole[3:]
    assert list(loader(start_step=3)) == []
    assert [batch.keys for batch in late] == whole[3:], "a loader can be run through again"


def test_batches_are_made_for_the_model(loader) -> None:
    batch = next(iter(loader()))
    assert isinstance(batch, Batch)
    assert set(batch.tensors) == {
        "input_ids", "attention_mask", "labels", "position_ids", "pixel_values", "image_flags", "num_patches",
    }  # fmt: skip
    assert batch.tensors["pixel_values"].shape == (len(batch.keys), 3, 28, 28)
    assert batch.n_label_tokens == int((batch.tensors["labels"] != -100).sum())


def test_missing_slots_are_inert(loader) -> None:
    batches = list(loader(slots=4, rank=2, world=3))  # slots 2 and 5, and there is no slot 5
    assert [batch.extras["slot"] for batch in batches] == [2, 5] * 3
    for batch in batches[1::2]:
        assert batch.keys == ()
        assert batch.n_label_tokens == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fault_is_one_line_from_a_worker_too(loader, reader, num_workers: int) -> None:
    def collate(features):
        raise DataError("no pad token")

    def read(index):
        raise SourceError("the disk is gone")

    with pytest.raises(DataError, match=r"^no pad token$"):
        list(loader(collate=collate, num_workers=num_workers))
    with pytest.raises(SourceError, match=r"^the disk is gone$"):
        list(loader(dataset=SimpleNamespace(read=read, locate=reader.locate), num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_left_out_and_named_and_nothing_else_moves(
    loader, reader, encoder, ids, num_workers: int
) -> None:
    """One slot loses a sample, one loses all; whether it was reading, decoding or the stage that failed."""
    whole = list(loader())
    lost = set(whole[1].keys) | {whole[4].keys[0]}
    unread = next(index for index in range(23) if reader.key(index) == whole[4].keys[0])
    to_stage = partial(encoder.with_stage, spec=stage_spec(1, c_thought=2), ids=ids)

    def read(index: int) -> Sample:
        if index == unread:
            raise DataError("{} (key {}): broken tar header".format(*reader.locate(index)))
        return reader.read(index)

    def stage(features):
        if features["key"] in lost:
            raise DataError("it is too long")
        return to_stage(features)

    source = SimpleNamespace(read=read, locate=reader.locate)
    found = list(loader(dataset=source, stage=stage, num_workers=num_workers))
    assert [batch.keys for batch in found] == [tuple(key for key in one.keys if key not in lost) for one in whole]
    assert found[1].keys == () and found[1].n_label_tokens == 0
    bad = bad_samples_of(found)
    assert {one.key for one in bad} == lost and len(bad) == len(lost)
    assert {one.reason for one in bad} == {"it is too long", "broken tar header"}
    for one in bad:
        assert (one.shard, one.key) in {reader.locate(index) for index in range(23)}
    assert all(torch.equal(a.tensors["labels"], b.tensors["labels"]) for a, b in zip(found[5:], whole[5:], strict=True))


def test_the_process_random_state_is_left_alone(loader) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    list(loader())
    list(loader(num_workers=1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_workers_prepare_in_other_processes(loader, tokenizer, ids) -> None:
    def collate(features) -> Batch:
        return Batch({}, tuple(f["key"] for f in features), 0, extras={"process": os.getpid()})

    processes = {batch.extras["process"] for batch in loader(collate=collate, num_workers=2)}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_bad_ranks_and_positions_are_named(loader) -> None:
    with pytest.raises(DataError, match="rank is 2 of 2"):
        loader(rank=2, world=2)
    with pytest.raises(DataError, match="start_step is 4, but the epoch has 3"):
        loader(start_step=4)


def test_reads_follow_the_plan(reader, loader) -> None:
    asked = []

    class Spy:
        def read(self, index: int):
            asked.append(index)
            return reader.read(index)

        locate = reader.locate

    one = loader(dataset=Spy())
    list(one)
    assert asked == np.concatenate([hand for step in range(3) for hand in one.plan.step(step)]).tolist()


def test_a_plan_balanced_by_cost_goes_on_after_any_step_with_any_number_of_ranks(loader, reader) -> None:
    costs = reader.costs(lambda width, height: 1, 1)
    plan = make_plan(costs, seed=1, epoch=0, slots=4, samples_per_step=8, balance="cost", group=2)
    expected = steps_of([loader(plan=plan)])
    keys = Counter(key for slots in expected.values() for _, row in slots for key in row)
    assert keys == {reader.key(i): 1 for i in range(23)}
    for start in range(len(plan) + 1):
        rest = {step: slots for step, slots in expected.items() if step >= start}
        for world in (1, 2, 3, 8, 64):
            loaders = [loader(plan=plan, rank=rank, world=world, start_step=start) for rank in range(world)]
            assert {len(one) for one in loaders} == {len(loaders[0])}
            assert steps_of(loaders) == rest


def test_batches_of_workers_may_all_be_kept(loader) -> None:
    """More than there are buffers: none is written over while somebody looks at it."""
    kept = list(loader(samples_per_step=4, num_workers=1))
    alone = list(loader(samples_per_step=4))
    assert len(kept) == 24
    for mine, theirs in zip(kept, alone, strict=True):
        assert all(torch.equal(mine.tensors[name], theirs.tensors[name]) for name in theirs.tensors)
