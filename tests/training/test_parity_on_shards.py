"""Two ranks under ZeRO-3, on shards, with micro-batches balanced by cost: the losses of one process."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tests.training.ranks import run, start

OPTIONS = (
    "train_data_path=data/arrow_maze/shards/train", "balance=cost", "batch_size_training=8", "samples_per_epoch=null",
    "num_workers=1", "stages.0.epochs=3", "stop_after_stage=0", "eval_every_n_epochs=9",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_and_one_process_have_the_same_losses(home: Path) -> None:
    """20 steps and more, with accumulation. Which samples run together is decided by the ranks of the first start,
    so the one process takes the run over after its first step."""
    first = run(home, "parity-two", *OPTIONS, "max_steps=1", zero="zero3")
    shutil.copytree(first.folder, first.folder.with_name("parity-one"))
    refused = start(home, "parity-one", *OPTIONS, "batch_size_training=4", zero="zero3")
    assert refused.finish() == [2, 2]
    assert "was started with 4 micro-batches an optimizer step over 2 rank(s)" in refused.text
    two = run(home, "parity-two", *OPTIONS, zero="zero3").rows()
    one = run(home, "parity-one", *OPTIONS, ranks=1, zero="zero3").rows()
    assert len(two) > 20
    assert [row["samples"] for row in one] == [row["samples"] for row in two]
    assert len({b["samples"] - a["samples"] for a, b in pairwise(two)}) > 1, "sizes of steps vary"
    losses_two, losses_one = ([row["loss"] for row in rows[:21]] for rows in (two, one))
    print("PARITY", max(abs(a - b) / b for a, b in zip(losses_one, losses_two, strict=True)))
    assert losses_one == pytest.approx(losses_two, rel=1e-5)
    assert losses_two[20] < 0.95 * losses_two[0]
