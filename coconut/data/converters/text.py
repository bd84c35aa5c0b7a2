"""Small pieces that the converters share: sentences, lettered choices, the most frequent answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from coconut.types import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: A sentence ends at . ! ? and space before a capital, digit or quote, but not after an initial or abbreviation.
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Mr|Ms|Dr|St|vs)\.)(?<!\b(?:Mrs|e\.g|i\.e|Fig)\.)\s+(?=[\"'(]?[A-Z0-9])"
)


def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text; a line break ends one as well."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(part.strip() for line in lines for part in _SENTENCE_END.split(line) if part.strip())


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question and a line for each choice: ``A. cat``. Only a question's text reaches the model."""
    lines = (f"{LETTERS[number]}. {choice}" for number, choice in enumerate(choices))
    return "\n".join([question.strip(), *lines])


def letter(index: int, choices: Sequence[str], source: str) -> str:
    """The letter of a choice; raises DataError for one that is not there."""
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < min(len(choices), len(LETTERS)):
        raise DataError(f"{source}: the right choice is number {index!r} of {len(choices)}")
    return LETTERS[index]


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that most people gave; of equals, the first."""
    return Counter(answers).most_common(1)[0][0]
