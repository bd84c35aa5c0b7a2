"""Sets mixed by weight, read by ranks and workers: exact shares, the same steps on any of them, resume in mid-epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from coconut.data.bad_samples import bad_samples_of
from coconut.data.order import MixturePart
from coconut.data.plan import EpochPlan, make_plan
from coconut.data.shard_sets import ShardSets
from coconut.data.shards import ShardReader, write_shards
from coconut.data.stream import StreamLoader
from coconut.types import Batch, DataError, Sample

SIZES = {"few": 12, "many": 90}
WEIGHTS = {"few": 2.0, "many": 3.0}
LENGTH, SLOTS = 75, 8  # 30 and 45 samples: "few" comes two and a half times, of "many" comes a half
EPOCHS = 3


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> ShardSets:
    """Two sets whose shards and keys have the same names."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, size in SIZES.items():
        samples = [Sample(f"key-{i}", f"{name} {i} ?" + " a" * (i % 7), ("red",) * (i % 3), "red") for i in range(size)]
        write_shards(samples, folder / name)
    return ShardSets({str(folder / name): ShardReader(folder / name) for name in SIZES})


def plan_of(sets: ShardSets, epoch: int, balance: str) -> EpochPlan:
    parts = [MixturePart(sets.first[path], sets.sizes[path], WEIGHTS[path.rpartition("/")[2]]) for path in sets.readers]
    costs = np.concatenate([reader.costs(lambda w, h: 1, 1) for reader in sets.readers.values()])
    return make_plan(
        costs, seed=3, epoch=epoch, slots=SLOTS, samples_per_step=16, samples_per_epoch=LENGTH, balance=balance,
        group=2, parts=parts,
    )  # fmt: skip


def loader_of(sets: ShardSets, plan: EpochPlan, **options: Any) -> StreamLoader:
    def question_only(features: Any) -> Batch:
        return Batch({}, tuple(one["key"] for one in features), n_label_tokens=0)

    def encode(sample: Sample, _: Any) -> dict[str, Any]:
        if sample.question.startswith("few 3 "):
            raise DataError(f"shard-000000.tar (key {sample.key}): broken")
        return {"key": " ".join(sample.question.split()[:2])}

    return StreamLoader(sets, plan, encode=encode, stage=dict, collate=question_only, **options)


def steps_of(loaders: list[StreamLoader]) -> list[list[str]]:
    """Samples of each optimizer step, slot after slot."""
    steps: dict[int, dict[int, tuple[str, ...]]] = {}
    for row in zip(*loaders, strict=True):
        for batch in row:
            steps.setdefault(batch.extras["step"], {})[batch.extras["slot"]] = batch.keys
    return [[key for slot in sorted(step) for key in step[slot]] for step in steps.values()]


@pytest.mark.parametrize("balance", ["count", "cost"])
def test_exact_shares_on_any_ranks(sets: ShardSets, balance: str) -> None:
    seen: Counter[str] = Counter()
    for epoch in range(EPOCHS):
        plan = plan_of(sets, epoch, balance)
        alone = steps_of([loader_of(sets, plan)])
        for world in (2, 8):
            assert steps_of([loader_of(sets, plan, rank=rank, world=world) for rank in range(world)]) == alone
        counted = Counter(key for step in alone for key in step)
        n_few = sum(count for key, count in counted.items() if key.startswith("few"))
        n_bad = len(bad_samples_of(loader_of(sets, plan)))
        assert (n_few + n_bad, counted.total() - n_few) == (30, 45)
        assert n_bad in (2, 3)
        seen += counted
    few = {seen[f"few {i}"] for i in range(SIZES["few"]) if i != 3}
    many = {seen[f"many {i}"] for i in range(SIZES["many"])}
    assert few == {7, 8}, "90 samples of a set of 12"
    assert many == {1, 2}, "135 samples of a set of 90: after three epochs all have come"


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 8])
def test_the_same_with_a_loader_process(sets: ShardSets, world: int) -> None:
    plan = plan_of(sets, 1, "cost")
    loaders = [loader_of(sets, plan, rank=rank, world=world, num_workers=1) for rank in range(world)]
    assert steps_of(loaders) == steps_of([loader_of(sets, plan)])


@pytest.mark.parametrize("balance", ["count", "cost"])
def test_going_on_in_mid_epoch_with_other_ranks(sets: ShardSets, balance: str) -> None:
    plan = plan_of(sets, 1, balance)
    unbroken = steps_of([loader_of(sets, plan)])
    for stop, world in ((1, 8), (2, 3), (len(plan) - 1, 2)):
        rest = [loader_of(sets, plan, rank=rank, world=world, start_step=stop) for rank in range(world)]
        assert steps_of(rest) == unbroken[stop:]


def test_sets_are_told_apart_where_names_repeat(sets: ShardSets) -> None:
    few, many = sets.readers
    assert len(sets) == 102 and sets.key(0) == sets.key(12) == "key-0"
    assert sets.locate(0) == (f"{few}/shard-000000.tar", "key-0")
    assert sets.locate(12) == (f"{many}/shard-000000.tar", "key-0")
    assert sets.read(11).question.startswith("few 11") and sets.read(12).question.startswith("many 0")
    bad = bad_samples_of(loader_of(sets, plan_of(sets, 0, "count")))
    assert {(one.shard, one.key, one.reason) for one in bad} == {(f"{few}/shard-000000.tar", "key-3", "broken")}
    alone = ShardSets({few: sets.readers[few]}, limit=5)
    assert len(alone) == len(alone.n_steps()) == len(alone.patches(lambda w, h: 1)) == 5
    assert alone.locate(4) == ("shard-000000.tar", "key-4"), "of one set, the shard's name is enough"
