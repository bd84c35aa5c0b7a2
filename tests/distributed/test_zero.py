"""Unequal ranks under ZeRO: no hang, and the gradients of one process."""

from __future__ import annotations

import os

import pytest

from tests.distributed.launcher import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SITUATIONS = "200" if os.environ.get("COCONUT_FULL_TESTS") else "24"


@pytest.mark.parametrize(
    ("stage", "mode"), [("3", "plain"), ("3", "checkpointed"), ("3", "layers"), ("2", "checkpointed"), ("1", "plain")]
)
def test_random_situations_equal_one_process(stage: str, mode: str) -> None:
    output = run_ranks("tests.distributed.parity_worker", stage, SITUATIONS, "0", mode)
    assert f"all equal: stage {stage}" in output


@pytest.mark.parametrize("fault", ["cut-thoughts", "cut-cache"])
def test_a_cut_gradient_is_seen(fault: str) -> None:
    output = run_ranks("tests.distributed.parity_worker", "3", "6", "0", fault)
    assert f"fault seen: {fault}" in output
