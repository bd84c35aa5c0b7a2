"""Unequal ranks under ZeRO: no hang, and the gradients of one process."""

from __future__ import annotations

import os

import pytest

from tests.distributed.launcher import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SITUATIONS = "200" if os.environ.get("COCONUT_FULL_TESTS") else "24"


@pytest.mark.parametrize(
    ("stage", "special"),
    [
        ("3", "plain"),
        ("3", "checkpointed,frozen"),
        ("3", "checkpointed,frozen,lora"),
        ("3", "layers,checkpointed,frozen,lora"),
        ("3", "checkpointed,language"),
        ("2", "checkpointed,frozen,lora"),
        ("3", "layers,projector"),
        ("3", "layers,checkpointed,jacobi"),
        ("3", "projector,offload"),
        ("2", "checkpointed,normed"),
        ("1", "jacobi"),
    ],
)
def test_random_situations_equal_one_process(stage: str, special: str) -> None:
    output = run_ranks("tests.distributed.parity_worker", stage, SITUATIONS, "0", special)
    assert f"all equal: stage {stage}" in output


@pytest.mark.parametrize("fault", ["cut-thoughts", "cut-cache"])
def test_a_cut_gradient_is_seen(fault: str) -> None:
    output = run_ranks("tests.distributed.parity_worker", "3", "6", "0", fault)
    assert "fault seen" in output and fault in output


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_answers_of_unlike_length_end_alike(how: str) -> None:
    assert run_ranks("tests.distributed.decoding_worker", how).count("answers equal") == 2


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_a_step_does_not_hang_on_how_it_is_cut(stage: str) -> None:
    """Gradient norm, and so clipping, and the weights after the step: the same for one micro-batch and for four."""
    found = []
    for accumulation in ("1", "4"):
        output = run_ranks("tests.distributed.accumulation_worker", stage, accumulation, ranks=1)
        words = next(line for line in output.splitlines() if line.startswith("NORM")).split()
        found.append([float(word) for word in words[1::2]])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][0] > 3 or stage == "0", "it is clipped"
