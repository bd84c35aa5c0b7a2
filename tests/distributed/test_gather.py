"""ZeRO-3 gathers each weight about once a step, whatever the number of thoughts is."""

from __future__ import annotations

import pytest

from benchmarks.gathered import measure_gathered

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_changing_number_of_thoughts_gathers_no_more_than_none() -> None:
    assert measure_gathered()["gathered_vs_k0"] <= 1.15


def test_layer_by_layer_it_does() -> None:
    """The comparison can fail: where the decoder does not fit, changing thoughts cost several times the bytes."""
    assert measure_gathered(by_layers=True)["gathered_vs_k0"] > 1.5
