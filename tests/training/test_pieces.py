"""Pieces written under one ZeRO stage and number of ranks, read under others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
EVERY_STAGE = ("read:3", "read:2", "read:1", "read:0")


def losses(folder: Path, dtype: str, *moves: str, ranks: int) -> dict[str, list[float]]:
    output = run_ranks("tests.training.pieces_worker", str(folder), dtype, *moves, ranks=ranks)
    line = next(line for line in output.splitlines() if line.startswith("LOSSES"))
    return json.loads(line.removeprefix("LOSSES"))


@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 3), ("fp32", 2), ("bf16", 3)])
def test_every_layout_goes_on_from_every_other(tmp_path: Path, dtype: str, stage: int) -> None:
    """The network has odd sizes and a frozen layer, and the reader starts from other weights."""
    found = losses(tmp_path / "pieces", dtype, f"write:{stage}", *EVERY_STAGE, ranks=2)
    unbroken = found.pop(f"write:{stage}")[3:]
    found |= {f"alone {move}": v for move, v in losses(tmp_path / "pieces", dtype, *EVERY_STAGE, ranks=1).items()}
    for move, after in found.items():
        assert after == pytest.approx(unbroken, rel=1e-5 if dtype == "fp32" else 1e-2), move


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_dropped_update_leaves_no_trace(tmp_path: Path, dtype: str) -> None:
    found = losses(tmp_path / "pieces", dtype, "write:2", "drop:3", "drop:2", "drop:1", "drop:0", ranks=2)
    for move, after in found.items():
        assert after == pytest.approx(found["write:2"], rel=1e-5 if dtype == "fp32" else 1e-2), move
