"""Runs on mixtures: JSON beside shards, a mixture for a stage, what is logged, resume, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.ranks import run, start

A, B = "data/arrow_maze/shards/train", "data/words.json"  # 256 pictures; 40 texts
MIXTURE = f"train_data_path={{{A}: 3, {B}: 1}}"
OPTIONS = (
    "samples_per_epoch=120", "global_batch_size=24", "batch_size_training=6", "balance=cost", "num_workers=1",
    "stages.0.epochs=2", "stop_after_stage=1", "eval_every_n_epochs=9", f"stages.1.train_data_path={B}",
)  # fmt: skip


@pytest.fixture(scope="module")
def texts(home: Path) -> Path:
    path = home / B
    records = [
        {"id": str(n), "question": "start a4 ?" + " up" * (n % 9), "steps": ["blue up a3"], "answer": "red"}
        for n in range(40)
    ]
    path.write_text(json.dumps(records))
    return path


@pytest.mark.slow
@pytest.mark.distributed
class TestRuns:
    def test_a_run_goes_on_with_its_mixture_on_other_ranks(self, home: Path, texts: Path) -> None:
        """Stopped in mid-epoch and gone on with on one rank, not with other data: the losses of the unbroken run."""
        unbroken = run(home, "mix-unbroken", MIXTURE, *OPTIONS)
        stopped = run(home, "mix-stopped", MIXTURE, *OPTIONS, "max_steps=7")
        assert [row["loss"] for row in stopped.rows()] == [row["loss"] for row in unbroken.rows()[:7]]
        for change, said in (
            (f"train_data_path={{{A}: 2, {B}: 1}}", f"train_data_path was {{'{A}': 3.0, '{B}': 1.0}} and is"),
            ("stages.1.train_data_path=null", "stages.1.train_data_path"),
            (f"stages.1.train_data_path={A}", f"stages.train_data_path was {{'1': '{B}'}} and is {{'1': '{A}'}}"),
        ):
            refused = start(home, "mix-stopped", MIXTURE, *OPTIONS, change, ranks=1)
            assert refused.finish() == [2]
            assert said in refused.text
        alone = run(home, "mix-stopped", MIXTURE, *OPTIONS, ranks=1)
        assert [row["samples"] for row in alone.rows()] == [row["samples"] for row in unbroken.rows()]
        assert [row["loss"] for row in alone.rows()] == pytest.approx([r["loss"] for r in unbroken.rows()], rel=1e-5)

        first, second = unbroken.rows("plan")
        assert {path: one["samples"] for path, one in first["sets"].items()} == {A: 90, B: 30}
        assert {path: one["samples"] for path, one in second["sets"].items()} == {B: 120}
        assert first["sets"][A]["tokens"] > 3 * first["sets"][B]["tokens"]
        assert 1 <= first["cost_mean"] < first["random_cost_mean"] and first["padding"] < first["random_padding"]
        assert f"{A}: 90 samples an epoch (75.0%)" in unbroken.text
        assert "costliest rank of a micro-step" in unbroken.text


@pytest.mark.slow
@pytest.mark.distributed
def test_other_data_under_the_same_name_are_refused(home: Path, texts: Path) -> None:
    path = home / "data" / "changing.json"
    records = json.loads(texts.read_text())
    path.write_text(json.dumps(records))
    options = ("train_data_path=data/changing.json", *OPTIONS)
    run(home, "swapped", *options, "max_steps=1", ranks=1)
    path.write_text(json.dumps(records[::-1]))
    refused = start(home, "swapped", *options, "max_steps=2", ranks=1)
    assert refused.finish() == [2]
    assert "contents of train_data_path was" in refused.text
