"""From a generated text to right or wrong, and from counts to an interval.

    text -> answer after the last "###" -> normalised -> equal to the normalised truth?

A text without "###" gave no answer and is wrong. Nothing here can drop a sample: a failure stays in the denominator.
"""

from __future__ import annotations

import re
import unicodedata
from math import sqrt

ANSWER_MARK = "###"
#: Standard normal quantile of a two-sided 95 % interval.
Z_95 = 1.959963984540054

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def extract_answer(text: str) -> str | None:
    """What follows the last answer mark, or None where the text has no answer at all.

    The last mark counts, since reasoning may mention the mark itself; an empty answer is None too.
    """
    _, mark, answer = text.rpartition(ANSWER_MARK)
    return (answer.strip() or None) if mark else None


def normalise(answer: str) -> str:
    """The form in which two answers are compared.

    Case, spacing, the width of Unicode characters, commas that group thousands, surrounding quotes and a closing
    full stop carry no meaning in an answer; everything else does.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    text = _THOUSANDS.sub("", text)
    return text.removesuffix(".").strip(" \"'`")


def exact_match(prediction: str | None, truth: str) -> bool:
    """Whether an extracted answer is the truth, after normalisation; None (no answer) never is."""
    return prediction is not None and normalise(prediction) == normalise(truth)


def wilson_interval(n_right: int, n_total: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a proportion; sound at 0 % and 100 %, where the textbook interval has no width.

    Args:
        n_right: successes.
        n_total: trials; none at all leaves the whole range (0, 1).
        z: normal quantile, 95 % by default.
    """
    if not 0 <= n_right <= n_total:
        raise ValueError(f"{n_right} right of {n_total} is no proportion")
    if n_total == 0:
        return 0.0, 1.0
    share = n_right / n_total
    scale = 1 + z * z / n_total
    centre = (share + z * z / (2 * n_total)) / scale
    half = z / scale * sqrt(share * (1 - share) / n_total + z * z / (4 * n_total * n_total))
    # At the ends rounding may leave 1e-17 where algebra says exactly 0 or 1.
    low = 0.0 if n_right == 0 else max(0.0, centre - half)
    high = 1.0 if n_right == n_total else min(1.0, centre + half)
    return low, high
