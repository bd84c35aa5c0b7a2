"""Text problems of the Coconut paper: GSM8K-Aug and ProsQA.

Layouts as these places describe them; no downloaded file was compared with them yet:

GSM8K-Aug  github.com/da03/Internalize_CoT_Step_by_Step, data/gsm8k/{train,valid,test}.txt, a line each:
           question||<<16-3-4=9>> <<9*2=18>> #### 18        (a test line holds written sentences instead)
           github.com/facebookresearch/coconut turns them into JSON of question, steps (the <<...>>), answer;
           the hub's copy (zen-E/GSM8k-Aug) has question, cot, answer.
ProsQA     github.com/facebookresearch/coconut, data/prosqa_{train,valid,test}.json: question, steps, answer,
           idx_to_symbol, edges, root, target, neg_target.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from coconut.data.converters.sources import Row, field
from coconut.data.prosqa import closing_question
from coconut.data.prosqa_picture import draw_graph
from coconut.types import DataError, Sample

_STEP = re.compile(r"<<.*?>>")

Rows = Iterable[tuple[str, Row]]


def gsm8k_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows (question, cot, answer) of the text files of iCoT."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question, bar, rest = line.partition("||")
        cot, mark, answer = rest.rpartition("####")
        if not (bar and mark):
            raise DataError(f"{path}, line {number}: not of the form question||steps #### answer")
        yield f"{path}:{number - 1}", {"question": question, "cot": cot, "answer": answer}


def gsm8k(rows: Rows, split: str) -> Iterator[Sample]:
    """GSM8K-Aug; a step is one <<calculation>>, or the whole text where there are none."""
    for number, (source, row) in enumerate(rows):
        steps = row.get("steps")
        if steps is None:
            cot = str(field(row, "cot", source)).strip()
            steps = _STEP.findall(cot) or ([cot] if cot else [])
        question, answer = (str(field(row, name, source)).strip() for name in ("question", "answer"))
        yield Sample(f"gsm8k-{split}-{number}", question, tuple(steps), answer.replace(",", ""), source=source)


def prosqa(rows: Rows, split: str, *, picture: bool) -> Iterator[Sample]:
    """ProsQA as text, or with its graph as a picture, of which only the closing question is asked."""
    for number, (source, row) in enumerate(rows):
        question, answer = (str(field(row, name, source)) for name in ("question", "answer"))
        images: tuple[bytes, ...] = ()
        if picture:
            images, question = (_drawn(row, source),), closing_question(question)
        yield Sample(
            f"prosqa-{split}-{number}", question, tuple(field(row, "steps", source)), answer, images, (), source
        )


def _drawn(row: dict[str, Any], source: str) -> bytes:
    try:
        return draw_graph(row)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{source}: its graph (idx_to_symbol, edges) cannot be drawn: {error!r}") from None
