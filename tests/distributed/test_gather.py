"""ZeRO-3 gathers each weight about once a step, whatever the number of thoughts is."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launcher import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def figures(kind: str) -> dict[str, float]:
    output = run_ranks("tests.distributed.gather_worker", kind)
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"kind"')))


def test_a_changing_number_of_thoughts_gathers_no_more_than_none() -> None:
    assert figures("leaf")["gathered_vs_k0"] <= 1.15


def test_layer_by_layer_it_does() -> None:
    """The comparison can fail: where the decoder does not fit, changing thoughts cost several times the bytes."""
    assert figures("layers")["gathered_vs_k0"] > 1.5
