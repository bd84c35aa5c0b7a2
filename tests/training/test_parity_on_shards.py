"""Two ranks under ZeRO-3, on shards, with micro-batches balanced by cost: the losses of one process."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from coconut.data.plan import make_plan
from coconut.data.shards import ShardReader, write_shards
from tests.training.ranks import run, start

OPTIONS = (
    "train_data_path=data/varied", "balance=cost", "batch_size_training=8", "samples_per_epoch=null",
    "num_workers=1", "stages.0.epochs=3", "stop_after_stage=0", "eval_every_n_epochs=9",
)  # fmt: skip


def write_varied(home: Path) -> ShardReader:
    """The maze with texts of 20 to 120 tokens."""
    reader = ShardReader(home / "data" / "arrow_maze" / "shards" / "train")
    samples = map(reader.read, range(len(reader)))
    varied = [dataclasses.replace(one, steps=one.steps[n % 4 :] * (n % 5 + 1)) for n, one in enumerate(samples)]
    write_shards(varied, home / "data" / "varied")
    return ShardReader(home / "data" / "varied")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_and_one_process_have_the_same_losses(home: Path) -> None:
    """20 steps and more, with accumulation. Which samples run together is decided by the ranks of the first start,
    so the one process takes the run over after its first step."""
    reader = write_varied(home)
    costs, tails = reader.costs(lambda *_: 1, 16), reader.tail_tokens()
    plan = make_plan(
        costs, seed=0, epoch=0, slots=4, samples_per_step=32, balance="cost", group=2, lengths=(costs - tails, tails)
    )
    assert len({len(slot) for slot in plan.step(0)}) > 1, "micro-batches of different numbers of samples"
    first = run(home, "parity-two", *OPTIONS, "max_steps=1", zero="zero3")
    shutil.copytree(first.folder, first.folder.with_name("parity-one"))
    refused = start(home, "parity-one", *OPTIONS, "batch_size_training=4", zero="zero3")
    assert refused.finish() == [2, 2]
    assert "was started with 4 micro-batches an optimizer step over 2 rank(s)" in refused.text
    two = run(home, "parity-two", *OPTIONS, zero="zero3").rows()
    one = run(home, "parity-one", *OPTIONS, ranks=1, zero="zero3").rows()
    assert len(two) > 20
    assert [row["samples"] for row in one] == [row["samples"] for row in two]
    losses_two, losses_one = ([row["loss"] for row in rows[:21]] for rows in (two, one))
    print("PARITY", max(abs(a - b) / b for a, b in zip(losses_one, losses_two, strict=True)))
    assert losses_one == pytest.approx(losses_two, rel=1e-5)
    assert losses_two[20] < 0.95 * losses_two[0]
