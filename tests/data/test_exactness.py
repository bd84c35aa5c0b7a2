"""Each sample once an epoch, in the same optimizer steps, on any ranks and workers, and after any number of stops."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from coconut.data.bad_samples import bad_samples_of
from coconut.data.plan import EpochPlan, make_plan
from coconut.data.shards import ShardReader, write_shards
from coconut.data.stream import StreamLoader
from coconut.types import Batch, DataError, Sample

N_SAMPLES = 331
SLOTS, SAMPLES_A_STEP = 8, 24
RANKS = (1, 2, 3, 4, 8, 64)
BALANCES = ("none", "count", "cost")


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> ShardReader:
    """Samples without pictures, of very different length, in several shards."""
    draw = random.Random(0)
    samples = [
        Sample(f"sample-{i}", "start a ? " * draw.randint(1, 40), ("red up b",) * draw.randint(0, 4), "red")
        for i in range(N_SAMPLES)
    ]
    folder = tmp_path_factory.mktemp("exact") / "shards"
    write_shards(samples, folder, shard_size_mb=0.1)
    assert len(list(folder.glob("*.tar"))) > 3
    return ShardReader(folder)


@pytest.fixture(scope="module")
def plans(reader) -> dict[str, EpochPlan]:
    costs, tails = reader.costs(lambda width, height: 1, 1), reader.tail_tokens()
    lengths = (costs - tails, tails)
    options: dict[str, Any] = {"seed": 7, "epoch": 1, "slots": SLOTS, "samples_per_step": SAMPLES_A_STEP}
    return {
        balance: make_plan(costs, **options, balance=balance, group=4 if balance == "cost" else 1, lengths=lengths)
        for balance in BALANCES
    }


def names_only(features: Iterable[dict[str, Any]]) -> Batch:
    return Batch({}, tuple(one["key"] for one in features), n_label_tokens=0)


@pytest.fixture(scope="module")
def loader(reader) -> Callable[..., StreamLoader]:
    def make(plan: EpochPlan, **options: Any) -> StreamLoader:
        return StreamLoader(
            reader, plan, encode=lambda sample, _: {"key": sample.key}, stage=dict, collate=names_only, **options
        )

    return make


def keys_of_steps(loaders: list[StreamLoader], n_steps: int | None = None) -> list[list[tuple[str, ...]]]:
    """The slots of each optimizer step, by the number of the slot, of ranks that advance together.

    Fails where the ranks do not have the same number of micro-batches.
    """
    accumulation = loaders[0].accumulation
    steps: list[list[tuple[str, ...]]] = []
    for number, row in enumerate(zip(*loaders, strict=True)):
        if n_steps is not None and number == n_steps * accumulation:
            break
        if number % accumulation == 0:
            steps.append([()] * (accumulation * len(loaders)))
        assert len({batch.extras["step"] for batch in row}) == 1
        for batch in row:
            steps[-1][batch.extras["slot"]] = batch.keys
    for step in steps:
        assert not any(step[SLOTS:]), "slots beyond the plan's are empty"
        del step[SLOTS:]
    return steps


@pytest.fixture(scope="module")
def unbroken(plans, loader) -> dict[str, list[list[tuple[str, ...]]]]:
    """The epoch on one rank without workers."""
    return {balance: keys_of_steps([loader(plan)]) for balance, plan in plans.items()}


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("world", RANKS)
def test_each_sample_once_and_the_same_steps_on_any_ranks(
    world: int, balance: str, plans, loader, reader, unbroken
) -> None:
    found = keys_of_steps([loader(plans[balance], rank=rank, world=world) for rank in range(world)])
    assert found == unbroken[balance]
    counted = Counter(key for step in found for slot in step for key in slot)
    assert counted == Counter(reader.key(index) for index in range(N_SAMPLES))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("world", RANKS)
def test_the_same_with_loader_processes(world: int, num_workers: int, plans, loader, unbroken) -> None:
    """Of 64 ranks, four: all from 8 on have no slot."""
    ranks = range(world) if world < 64 else (0, 7, 8, 63)
    plan = plans["cost"]
    loaders = [loader(plan, rank=rank, world=world, num_workers=num_workers) for rank in ranks]
    if world > len(ranks):
        found = [[batch.keys for batch in one] for one in loaders]
        alone = [[batch.keys for batch in loader(plan, rank=rank, world=world)] for rank in ranks]
        assert found == alone
        assert all(found[0]) and all(found[1]) and not any(found[2]) and not any(found[3])
    else:
        assert keys_of_steps(loaders) == unbroken["cost"]


@pytest.mark.parametrize("balance", BALANCES)
def test_stopped_at_random_steps_and_gone_on_with_other_ranks(balance: str, plans, loader, unbroken) -> None:
    """20 times: stops after random steps, 8 -> 4 -> 2 -> 8 ranks or others; all that is carried over is the step."""
    plan = plans[balance]
    for number in range(20):
        draw = random.Random(f"{balance}-{number}")
        worlds = [8, 4, 2, 8] if number % 2 == 0 else draw.choices(RANKS, k=4)
        stops = sorted(draw.sample(range(len(plan) + 1), 3))
        found: list[list[tuple[str, ...]]] = []
        for world, stop in zip(worlds, [*stops, len(plan)], strict=True):
            start = len(found)
            loaders = [loader(plan, rank=rank, world=world, start_step=start) for rank in range(world)]
            found += keys_of_steps(loaders, stop - start)
        assert found == unbroken[balance], (worlds, stops)


@pytest.mark.slow
def test_stopped_and_gone_on_with_other_loader_processes(plans, loader, unbroken) -> None:
    plan, found = plans["cost"], []
    for world, num_workers, stop in ((4, 1, 3), (2, 4, 5), (1, 0, 8), (2, 2, len(plan))):
        start = len(found)
        loaders = [
            loader(plan, rank=rank, world=world, start_step=start, num_workers=num_workers) for rank in range(world)
        ]
        found += keys_of_steps(loaders, stop - start)
    assert found == unbroken["cost"]


def test_a_sample_that_is_bad_is_bad_in_the_same_step_on_any_ranks(plans, reader, unbroken) -> None:
    """What is left out does not move what stays."""
    lost = set(random.Random(0).sample([reader.key(i) for i in range(N_SAMPLES)], 30))

    def encode(sample: Sample, _: Any) -> dict[str, Any]:
        if sample.key in lost:
            raise DataError("broken")
        return {"key": sample.key}

    expected = [[tuple(key for key in slot if key not in lost) for slot in step] for step in unbroken["cost"]]
    for world in (1, 3, 8):
        loaders = [
            StreamLoader(reader, plans["cost"], rank=rank, world=world, encode=encode, stage=dict, collate=names_only)
            for rank in range(world)
        ]
        assert keys_of_steps(loaders) == expected
        assert {bad.key for one in loaders for bad in bad_samples_of(one)} == lost


def test_going_on_late_reads_nothing_of_what_came_before(plans, reader) -> None:
    plan, asked = plans["cost"], []

    class Noting:
        locate = reader.locate

        def read(self, index: int) -> Sample:
            asked.append(index)
            return reader.read(index)

    late = StreamLoader(
        Noting(),
        plan,
        encode=lambda sample, _: {"key": sample.key},
        stage=dict,
        collate=names_only,
        start_step=len(plan) - 1,
    )
    assert len(list(late)) == late.accumulation
    assert sorted(asked) == sorted(plan.samples(len(plan) - 1).tolist())
