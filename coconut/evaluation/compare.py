"""Two evaluations of the same questions, compared question by question.

EVAL_A/predictions.jsonl + EVAL_B/predictions.jsonl --paired by key--> difference, interval, test
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coconut.evaluation.result import SUMMARY_FILE, EvaluationResult
from coconut.evaluation.stats import RESAMPLES, Estimate, compare_paired, estimate
from coconut.types import DataError


@dataclass(frozen=True)
class Comparison:
    """What a paired comparison says."""

    names: tuple[str, str]
    accuracies: tuple[float, float]
    difference: Estimate  # second minus first
    only: tuple[int, int]  # questions that only this one has fully right
    p_value: float
    test: str

    def text(self) -> str:
        """In lines that a person can read."""
        width = max(map(len, self.names))
        lines = [
            f"{name:{width}}  {accuracy:.2%}, alone right on {only:,}"
            for name, accuracy, only in zip(self.names, self.accuracies, self.only, strict=True)
        ]
        d = self.difference
        lines.append(
            f"second minus first: {100 * d.mean:+.2f} points (95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}, "
            f"{d.n:,} questions), p = {self.p_value:.3g} ({self.test})"
        )
        return "\n".join(lines)


def compare(first: Path, second: Path, seed: int = 0) -> Comparison:
    """Compare two evaluation folders.

    Raises:
        DataError: one is no evaluation, or they are not of the same questions.
    """
    results = [_read(first), _read(second)]
    by_key = [{p.key: p for p in result.predictions} for result in results]
    for folder, result, found in zip((first, second), results, by_key, strict=True):
        if len(found) < result.n_samples:
            raise DataError(f"{folder} has {result.n_samples} questions with {len(found)} keys; give each its own id")
    missing = by_key[0].keys() ^ by_key[1].keys()
    if missing:
        raise DataError(
            f"{first} and {second} are not of the same questions: {len(missing)} in one alone, first {min(missing)!r}"
        )
    pairs = [(by_key[0][key], by_key[1][key]) for key in by_key[0]]
    for a, b in pairs:  # data without ids has keys that only count
        if (a.question, a.answer) != (b.question, b.answer):
            raise DataError(
                f"{first} and {second} are not of the same questions: {a.key!r} is {a.question!r} ({a.answer!r}) in "
                f"the first, {b.question!r} ({b.answer!r}) in the second"
            )
    metrics = [result.options.metric for result in results]
    if metrics[0] != metrics[1]:
        raise DataError(f"{first} was scored by {metrics[0]}, {second} by {metrics[1]}; use one metric")
    paired = compare_paired([a.correct for a, _ in pairs], [b.correct for _, b in pairs], seed)
    differences = [b.score - a.score for a, b in pairs]
    is_share = all(p.score in (0.0, 1.0) for pair in pairs for p in pair)
    return Comparison(
        names=(str(first), str(second)),
        accuracies=(results[0].accuracy, results[1].accuracy),
        difference=paired.difference if is_share else estimate(differences, seed),
        only=(paired.only_first, paired.only_second),
        p_value=paired.p_value if is_share else sign_flip(differences, seed),
        test="exact McNemar test" if is_share else "sign-flip permutation test",
    )


def sign_flip(differences: list[float], seed: int, rounds: int = RESAMPLES) -> float:
    """How often random signs make the mean difference as large as it is; never 0, as the data itself is one draw."""
    values = np.array([d for d in differences if d])
    if not len(values):
        return 1.0
    generator, extreme = np.random.default_rng(seed), 0
    least = abs(values.sum()) - 1e-9  # sums of the same numbers in another order differ in their last digits
    for _ in range(rounds):
        extreme += abs(values[generator.random(len(values)) < 0.5].sum() * 2 - values.sum()) >= least
    return (extreme + 1) / (rounds + 1)


def _read(folder: Path) -> EvaluationResult:
    if not (folder / SUMMARY_FILE).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{SUMMARY_FILE}"))
        hint = f"; it contains {', '.join(inside)}" if inside else ""
        raise DataError(f"{folder} holds no evaluation: it has no {SUMMARY_FILE}{hint}")
    return EvaluationResult.load(folder)
