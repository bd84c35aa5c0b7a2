"""What makes an answer right: one function a metric, each giving a score from 0 to 1.

    exact     equal to the truth after normalisation
    numeric   the same number, however written
    choice    names the right choice, by its text or letter
    vqa       VQA's soft accuracy over the answers of several people
    aokvqa    A-OKVQA's direct-answer score: a third for each of them who said the same, at most 1

A text without an answer scores 0 under every metric.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import isclose

from coconut.evaluation.score import exact_match, normalise
from coconut.types import DataError, Sample

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FRACTION = re.compile(r"^([-+]?\d+)\s*/\s*(\d+)$")
_CHOICE = re.compile(r"^\(?([a-z])\)?(?:[.:)]|\s|$)")
_ARTICLES = {"a", "an", "the"}
_WORDS = {
    word: str(i)
    for i, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
_WORDS["none"] = "0"
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`,?!]")


def exact(answer: str, sample: Sample) -> float:
    return float(exact_match(answer, sample.answer))


def numeric(answer: str, sample: Sample) -> float:
    """1 where both are the same number to a millionth: "1,250.0 km" and "1250"; a share and its percentage differ.

    Raises:
        DataError: the truth is no number.
    """
    truth = read_number(sample.answer)
    if truth is None:
        raise DataError(f"{sample.source} (key {sample.key}): the answer {sample.answer!r} is no number; use exact")
    said = read_number(answer)
    return float(said is not None and isclose(said, truth, rel_tol=1e-6, abs_tol=1e-9))


def read_number(text: str) -> float | None:
    """The only number in a text, or None where there is none or more than one."""
    cleaned = normalise(text).replace("−", "-").lstrip("$€£ ")
    fraction = _FRACTION.match(cleaned)
    if fraction and int(fraction[2]):
        return int(fraction[1]) / int(fraction[2])
    found = _NUMBER.findall(cleaned)
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def choice(answer: str, sample: Sample) -> float:
    return float(chosen(answer, sample.choices) == right_choice(sample))


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Which choice an answer names: its text, or its letter ("B", "(b) dog", "B: dog"); None where it names none."""
    said = normalise(answer)
    texts = [normalise(text) for text in choices]
    if said in texts:
        return texts.index(said)
    match = _CHOICE.match(said)
    number = ord(match[1]) - ord("a") if match else len(texts)
    if match is None or number >= len(texts):
        return None
    rest = said[match.end() :].strip(" .:)")
    # "a dog" begins with a letter and names no choice by it: what follows a letter must be that choice's text.
    return number if rest in ("", texts[number]) else None


def right_choice(sample: Sample) -> int:
    """The number of the choice that is the truth.

    Raises:
        DataError: the sample has no choices, or its answer is none of them.
    """
    number = chosen(sample.answer, sample.choices)
    if number is None:
        raise DataError(
            f"{sample.source} (key {sample.key}): the answer {sample.answer!r} is none of its {len(sample.choices)} "
            "choices; give choices with the data, or use another metric"
        )
    return number


def aokvqa(answer: str, sample: Sample) -> float:
    """min(1, matches / 3), texts compared as they are but for case and blanks at the ends, as A-OKVQA's own script."""
    said = answer.strip().lower()
    return min(1.0, sum(said == text.strip().lower() for text in _references(sample)) / 3)


def vqa(answer: str, sample: Sample) -> float:
    """Mean over the people of min(1, matches among the others / 3), VQA's formula, on texts normalised as there.

    Its long list of contractions ("dont" for "don't") is left out: apostrophes are dropped on both sides instead.
    """
    said, texts = vqa_normalise(answer), [vqa_normalise(text) for text in _references(sample)]
    if len(texts) == 1:
        return float(said == texts[0])
    n_all = sum(said == text for text in texts)
    return sum(min(1.0, (n_all - (said == text)) / 3) for text in texts) / len(texts)


def vqa_normalise(text: str) -> str:
    """Lower case, digits for number words, without articles and punctuation."""
    lowered = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text.lower().replace("\n", " ").replace("'", ""))
    words = _PUNCTUATION.sub(" ", re.sub(r"(?<=\d),(?=\d)", "", lowered)).split()
    return " ".join(_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def _references(sample: Sample) -> tuple[str, ...]:
    if not sample.references:
        raise DataError(
            f"{sample.source} (key {sample.key}) has no direct_answers, which this metric compares with; use exact"
        )
    return sample.references


Metric = Callable[[str, Sample], float]
METRICS: dict[str, Metric] = {"exact": exact, "numeric": numeric, "choice": choice, "vqa": vqa, "aokvqa": aokvqa}


def score(metric: str, answer: str | None, sample: Sample) -> float:
    """Score of an extracted answer; None (no answer) scores 0, but only for a sample that the metric can judge."""
    found = METRICS[metric](answer or "", sample)
    return found if answer is not None else 0.0
