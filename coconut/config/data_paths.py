"""Training data as a configuration names it: one path, or several with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_EXAMPLE = "a path, or several with weights such as {data/a: 2, data/b: 1}"


def check_data_path(value: Any) -> Any:
    """A path, or a table path -> weight with weights as numbers; raises ValueError for anything else."""
    if isinstance(value, str):
        if value.strip() in ("", "None"):
            raise ValueError("must be text; write null for none")
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"must be {_EXAMPLE}")
    for path, weight in value.items():
        if not isinstance(path, str) or not path.strip():
            raise ValueError(f"holds {path!r}, which is no path; must be {_EXAMPLE}")
        if not _is_weight(weight):
            raise ValueError(
                f"gives {path} the weight {weight!r}; must be a number above 0 (leave out what weighs none)"
            )
    return {path: float(weight) for path, weight in value.items()}


def data_mixture(value: str | Mapping[str, float] | None) -> dict[str, float]:
    """Weight of each path, sorted by path, so that the order in which they were written does not count."""
    mixture = {value: 1.0} if isinstance(value, str) else dict(value or {})
    return dict(sorted(mixture.items()))


def _is_weight(value: Any) -> bool:
    try:  # PyYAML reads 1e-1 as text
        return not isinstance(value, bool) and 0 < float(value) < math.inf
    except (TypeError, ValueError):
        return False
