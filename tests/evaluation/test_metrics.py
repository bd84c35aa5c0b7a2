"""Metrics against values worked out by hand."""

from __future__ import annotations

import pytest

from coconut.evaluation.metrics import chosen, read_number, score, vqa_normalise
from coconut.types import DataError, Sample

ANIMALS = Sample("k", "?", (), "dog", choices=("cat", "dog", "a horse"), source="file.json:1")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,250", 1250.0),
        ("$3.50", 3.5),
        ("12 km", 12.0),
        ("-.5", -0.5),
        ("−4", -4.0),
        ("1/4", 0.25),
        ("2e3", 2000.0),
        ("three", None),
        ("2 or 3", None),
        ("", None),
    ],
)
def test_reading_numbers(text: str, number: float | None) -> None:
    assert read_number(text) == number


def test_numbers_are_right_however_written() -> None:
    sample = Sample("k", "?", (), "1,250")
    assert [score("numeric", said, sample) for said in ("1250.0", "1250 m", "1251", "x", None)] == [1, 1, 0, 0, 0]
    with pytest.raises(DataError, match="is no number"):
        score("numeric", "3", Sample("k", "?", (), "three"))


@pytest.mark.parametrize(
    ("said", "number"),
    [("Dog", 1), ("B", 1), ("(b) dog", 1), ("b: dog.", 1), ("A horse", 2), ("d", None), ("a dog", None), ("", None)],
)
def test_choices_are_named_by_text_or_letter(said: str, number: int | None) -> None:
    assert chosen(said, ANIMALS.choices) == number


def test_a_choice_is_scored_and_a_question_without_choices_refused() -> None:
    assert [score("choice", said, ANIMALS) for said in ("B", "cat", None)] == [1, 0, 0]
    with pytest.raises(DataError, match=r"file\.json:1 \(key k\): the answer 'fish' is none of its 3 choices"):
        score("choice", "B", Sample("k", "?", (), "fish", choices=ANIMALS.choices, source="file.json:1"))


def test_aokvqa_gives_a_third_a_match() -> None:
    sample = Sample("k", "?", (), "dog", references=("dog", "Dog ", "puppy", "cat", "a dog"))
    assert score("aokvqa", "dog", sample) == pytest.approx(2 / 3)
    assert score("aokvqa", "puppy", sample) == pytest.approx(1 / 3)
    assert score("aokvqa", "dog", Sample("k", "?", (), "dog", references=("dog",) * 10)) == 1.0
    assert score("aokvqa", None, sample) == 0.0


def test_vqa_leaves_one_person_out() -> None:
    # Three of ten agree: seven subsets still hold three matches, three hold two.
    sample = Sample("k", "?", (), "2", references=("two", "2.", "The 2", *["three"] * 7))
    assert score("vqa", "two", sample) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert score("vqa", "three", sample) == 1.0
    assert score("vqa", "four", sample) == 0.0


def test_vqa_normalisation() -> None:
    assert vqa_normalise("A red-ish, BALL!") == "red ish ball"
    assert vqa_normalise("1,000.5 dogs.") == "1000.5 dogs"
    assert vqa_normalise("don't") == "dont"


@pytest.mark.parametrize("metric", ["vqa", "aokvqa"])
def test_soft_scores_need_several_answers(metric: str) -> None:
    with pytest.raises(DataError, match="no direct_answers"):
        score(metric, None, ANIMALS)
