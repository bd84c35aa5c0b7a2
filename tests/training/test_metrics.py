"""Rows of metrics.jsonl: what each number is, on one rank and on two, with ZeRO and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coconut.model.norms import NormMeter
from coconut.training.metrics import Totals, progress_line
from coconut.training.step import StepPlan, batch_cost
from coconut.types import Batch
from coconut.utils.device import peak_flops, take_memory_peak
from tests.training.ranks import run

#: Of a train row, whatever the method.
ALWAYS = {"loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "patches_per_s", "step_s", "loader_wait_s"}
ALWAYS |= {"loader_wait_share", "imbalance", "padding", "memory_bytes", "stage", "step"}


def plan(**changes: float) -> StepPlan:
    values = {"batches": 2, "label_tokens": 10, "samples": 4, "tokens": 60, "patches": 6}
    values |= {"bad_samples": 0, "new_bad_samples": 0, "written": 0, "cells": 80, "costliest": 50.0, "mean_cost": 40.0}
    return StepPlan(**values | changes, stop_reason=None)  # type: ignore[arg-type]


def test_rates_are_sums_divided_once() -> None:
    totals = Totals(seconds=2.0, loader_wait_s=0.5)
    totals.add(5.0, plan(), 1e12, is_sound=True)
    totals.add(99.0, plan(tokens=20, costliest=30.0, mean_cost=24.0), 3e12, is_sound=False)
    rates = totals.rates(4e12, [6.0, 3.0, 40.0, 10.0])
    assert rates == pytest.approx(
        {
            "loss": 0.5, "samples_per_s": 4.0, "tokens_per_s": 40.0, "patches_per_s": 6.0, "step_s": 1.0,
            "loader_wait_s": 0.5, "loader_wait_share": 0.25, "imbalance": 1.25, "padding": 0.5, "mfu": 0.5,
            "thought_norm": 2.0, "embedding_norm": 4.0,
        }
    )  # fmt: skip
    assert "MFU 50.0%" in progress_line("here", rates, None)
    without = totals.rates(None, [0.0, 0.0, 40.0, 10.0])
    assert not {"mfu", "thought_norm", "embedding_norm"} & set(without)


def test_the_cost_of_a_batch_counts_its_padding() -> None:
    tensors = {"input_ids": torch.zeros(3, 10), "num_patches": torch.tensor([2, 0, 1])}
    assert batch_cost(Batch(tensors, ("a", "b", "c"), 0), 2, 5.0, 4.0) == 3 * (10 + 8) + 15
    assert batch_cost(Batch(tensors, (), 0), 2, 5.0, 4.0) == 0  # an inert one


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        (None, None),
    ],
)
def test_the_peak_of_known_devices(name: str | None, tflops: float | None) -> None:
    assert peak_flops(None, name) == (None if tflops is None else tflops * 1e12)
    assert peak_flops(2.5, name) == 2.5e12


def test_memory_is_that_of_this_process() -> None:
    before = take_memory_peak()
    held = torch.ones(50_000_000 // 4)
    assert 45e6 < take_memory_peak() - before < 200e6
    del held


def test_norms_are_those_of_thoughts_and_text() -> None:
    meter = NormMeter()
    embeds = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]]])
    meter.add(torch.tensor([[[6.0, 8.0], [7.0, 7.0]]]), torch.tensor([[True, False]]), embeds,
              torch.tensor([[True, True, False]]))  # fmt: skip
    assert meter.take() == [10.0, 1.0, 6.0, 2.0]
    assert meter.take() == [0.0] * 4


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("clip", ["1.0", "0"])
def test_the_gradient_norm_is_there_without_zero_too(home: Path, clip: str) -> None:
    """All the same on one rank and two, whatever the ZeRO stage; and so are the norms of thoughts."""
    common = ("max_steps=4", "start_stage=1", f"max_grad_norm={clip}", "peak_tflops=0.001")
    whole = run(home, f"plain-{clip}", *common, ranks=1, zero="")
    others = [
        run(home, f"plain2-{clip}", *common, ranks=2, zero=""),
        run(home, f"zero3-{clip}", *common, ranks=2, zero="zero3"),
    ]
    rows = whole.rows()
    assert len(rows) == 4 and all(set(row) >= ALWAYS | {"mfu", "thought_norm", "embedding_norm"} for row in rows)
    for other in others:
        for name in ("grad_norm", "thought_norm", "embedding_norm"):
            assert [row[name] for row in other.rows()] == pytest.approx([row[name] for row in rows], rel=2e-3)
        assert all(row["imbalance"] >= 1 and 0 < row["padding"] < 0.5 for row in other.rows())
    assert all(row["imbalance"] == 1 for row in rows)  # one rank is its own mean


@pytest.mark.slow
@pytest.mark.distributed
def test_mfu_is_model_flops_over_what_the_devices_could_do(home: Path) -> None:
    run_ = run(home, "mfu", "max_steps=3", "method=cot", "peak_tflops=0.5", "gradient_checkpointing=true", ranks=2)
    rows = run_.rows()
    assert not {"thought_norm", "embedding_norm"} & set().union(*rows)
    for row, before in zip(rows[1:], rows, strict=False):
        hardware = row["flops"] - before["flops"]  # 4 forward passes, as a layer's is computed again
        assert row["mfu"] == pytest.approx(0.75 * hardware / (row["step_s"] * 2 * 0.5e12), rel=1e-3)
        assert row["tokens_per_s"] == pytest.approx((row["tokens"] - before["tokens"]) / row["step_s"], rel=1e-3)
        assert row["patches_per_s"] == pytest.approx(row["samples_per_s"], rel=1e-3)  # a maze is one tile
