"""Answers, equality and intervals, against values worked out by hand."""

from __future__ import annotations

import pytest

from coconut.evaluation.score import exact_match, extract_answer, normalise, wilson_interval


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("blue up a3\nred left b3\n### green", "green"),
        ("### red ### blue", "blue"),  # the last mark counts
        ("###   two words \n", "two words"),
        ("no mark at all: green", None),
        ("# green", None),
        ("### ", None),
        ("", None),
    ],
)
def test_the_answer_is_what_follows_the_last_mark(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Red", "red"),
        ("  a   b ", "a b"),
        ("1,234,567", "1234567"),
        ("'green'.", "green"),
        ("\uff12", "2"),
        ("yes.", "Yes"),
    ],
)
def test_what_carries_no_meaning_is_ignored(left: str, right: str) -> None:
    assert exact_match(left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [("red", "dark red"), ("1,2", "12"), ("3.5", "35"), ("a b", "ab"), ("-1", "1"), ("#1", "1"), (None, "")],
)
def test_what_carries_meaning_is_kept(left: str | None, right: str) -> None:
    assert not exact_match(left, right)


def test_normalising_twice_changes_nothing() -> None:
    for text in ("'Red'.", "1,234.", " A  B "):
        assert normalise(normalise(text)) == normalise(text)


def test_wilson_interval_known_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    for n_right, n_total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)]:
        assert wilson_interval(n_right, n_total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_at_the_ends() -> None:
    low, high = wilson_interval(0, 20)
    assert (low, high) == (0.0, pytest.approx(0.1611, abs=5e-5))
    low, high = wilson_interval(20, 20)
    assert (low, high) == (pytest.approx(0.8389, abs=5e-5), 1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="21 right of 20"):
        wilson_interval(21, 20)
