"""How often generated ProsQA is answered without following an edge, as drawn by the paper and with ``--even``.

    python benchmarks/prosqa_shortcut.py                # graphs of 8 and 23 nodes, and even ones of 12

Three counts of each of the two answers (nodes above, nodes below, names above), compared by a logistic regression
that is fitted to the same problems: an upper bound on what these counts tell. A guess is right in half of the problems.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.data.prosqa import ENTITIES, generate

SIZE = 1000
CASES = ((8, False), (23, False), (12, True))


def counts(record: dict[str, Any], node: int) -> list[int]:
    above = [start for start, end in record["edges"] if end == node]
    n_below = sum(start == node for start, _ in record["edges"])
    return [len(above), n_below, sum(record["idx_to_symbol"][start] in ENTITIES for start in above)]


def told(records: list[dict[str, Any]]) -> float:
    """Share of the problems in which the better of the two answers is the true one, ties counted half."""
    gaps_NF = np.array([np.subtract(counts(r, r["target"]), counts(r, r["neg_target"])) for r in records], float)
    weights_F = np.zeros(gaps_NF.shape[1])
    for _ in range(500):
        weights_F += 0.2 * gaps_NF.T @ (1 / (1 + np.exp(gaps_NF @ weights_F))) / len(gaps_NF)
    score_N = gaps_NF @ weights_F
    return float(np.mean(score_N > 0) + 0.5 * np.mean(score_N == 0))


def main() -> None:
    shares = {case: told(list(generate("train", SIZE, 0, case[0], even=case[1]))) for case in CASES}
    for (n_nodes, is_even), share in shares.items():
        print(
            f"{n_nodes:2} nodes, {'even' if is_even else 'as in the paper':22}  {share:.1%}  {2 * share:.2f} of a guess"
        )


if __name__ == "__main__":
    main()
