"""Picture questions with written reasoning: A-OKVQA, ScienceQA, M3CoT, LLaVA-CoT-100k.

Layouts as these places describe them; no downloaded file was compared with them yet:

    A-OKVQA    github.com/allenai/aokvqa: aokvqa_v1p0_{train,val,test}.json, a list of question_id, image_id, question,
               choices, correct_choice_idx, direct_answers (10), rationales (3); images are COCO's of 2017,
               {train,val,test}2017/%012d.jpg. Hub: HuggingFaceM4/A-OKVQA (direct_answers is a list written as text).
    ScienceQA  github.com/lupantech/ScienceQA: problems.json, {id: question, choices, answer (index), hint, image
               (image.png or null), lecture, solution, split}; images/SPLIT/ID/image.png. Hub: derek-thomas/ScienceQA.
    M3CoT      github.com/LightChen233/M3CoT: data/{train,dev,test}.jsonl of id, question, choices, context, answer (a
               letter), rationale, image; images/. Hub: LightChen2333/M3CoT.
    LLaVA-CoT  github.com/PKU-YuanGroup/LLaVA-CoT: train.jsonl of id, image, conversations (turns from human and gpt),
               each reply <SUMMARY> <CAPTION> <REASONING> <CONCLUSION>. Hub: Xkev/LLaVA-CoT-100k.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from coconut.data.converters.sources import Row, field, images_of
from coconut.data.converters.text import LETTERS, letter, most_frequent, sentences, with_choices
from coconut.types import DataError, Sample

RATIONALES = ("first", "each", "sentences")
_PARTS = ("SUMMARY", "CAPTION", "REASONING")
_IMAGE_MARK = re.compile(r"\s*<image>\s*")

Rows = Iterable[tuple[str, Row]]


def aokvqa(rows: Rows, coco: Path, split: str, *, choices: bool, rationales: str) -> Iterator[Sample]:
    """A-OKVQA, with its choices lettered in the question, or with the answer that most people gave.

    Args:
        coco: folder of COCO's train2017, val2017 and test2017.
        split: train or val; names the folder of images.
        choices: multiple choice; else direct answers.
        rationales: the three rationales are alternatives. ``first`` takes the first as one step, ``each`` makes a
            sample of each, ``sentences`` splits the first into sentences, each a step.

    Raises:
        DataError: a row without an answer (the test split has none), or without a needed field.
    """
    if rationales not in RATIONALES:
        raise DataError(f"rationales is {rationales!r}; choose one of {', '.join(RATIONALES)}")
    for source, row in rows:
        options = [str(choice) for choice in field(row, "choices", source)]
        question = str(field(row, "question", source))
        if choices:
            index = _answer_of(row, "correct_choice_idx", source)
            question, answer = with_choices(question, options), letter(index, options, source)
        else:
            given = _answer_of(row, "direct_answers", source)
            answer = most_frequent(ast.literal_eval(given) if isinstance(given, str) else given)
        image = row.get("image") or f"{split}2017/{int(field(row, 'image_id', source)):012d}.jpg"
        images = images_of(image, coco, source)
        key, written = str(field(row, "question_id", source)), [str(text) for text in row.get("rationales") or []]
        if not written:
            raise DataError(f"{source}: field 'rationales' is missing or empty")
        for number, rationale in enumerate(written if rationales == "each" else written[:1]):
            steps = sentences(rationale) if rationales == "sentences" else (rationale.strip(),)
            suffix = f"-{number}" if rationales == "each" else ""
            yield Sample(key + suffix, question, steps, answer, images, tuple(options) if choices else (), source)


def scienceqa(rows: Rows, images: Path, *, lecture: bool) -> Iterator[Sample]:
    """ScienceQA; steps are the sentences of the solution, after those of the lecture if asked for.

    Args:
        rows: with an ``id`` and an ``image`` path, as `scienceqa_problems` makes them, or the hub's.
    """
    for number, (source, row) in enumerate(rows):
        options = [str(choice) for choice in field(row, "choices", source)]
        hint = str(row.get("hint") or "").strip()
        question = with_choices(f"{hint}\n{row['question']}" if hint else field(row, "question", source), options)
        reasoning = (row.get("lecture") or "" if lecture else "") + "\n" + (row.get("solution") or "")
        answer = letter(field(row, "answer", source), options, source)
        pictures = images_of(row.get("image"), images, source)
        key = str(row.get("id", number))
        yield Sample(key, question, sentences(reasoning), answer, pictures, tuple(options), source)


def scienceqa_problems(problems: Any, source: str, split: str) -> Iterator[tuple[str, Row]]:
    """Rows of one split of problems.json."""
    if not isinstance(problems, dict):
        raise DataError(f"{source} is no ScienceQA problems.json: an object of id -> problem")
    for key, problem in problems.items():
        if problem.get("split") == split:
            image = f"{split}/{key}/{problem['image']}" if problem.get("image") else None
            yield f"{source}:{key}", {**problem, "id": key, "image": image}


def m3cot(rows: Rows, images: Path) -> Iterator[Sample]:
    """M3CoT; a step is a sentence of the rationale."""
    for source, row in rows:
        options = [str(choice) for choice in field(row, "choices", source)]
        context = str(row.get("context") or "").strip()
        question = with_choices(f"{context}\n{row['question']}" if context else field(row, "question", source), options)
        given = str(field(row, "answer", source)).strip().upper()
        answer = letter(LETTERS.find(given) if len(given) == 1 else -1, options, source)
        steps = sentences(str(field(row, "rationale", source)))
        key = str(field(row, "id", source))
        pictures = images_of(row.get("image"), images, source)
        yield Sample(key, question, steps, answer, pictures, tuple(options), source)


def llava_cot(rows: Rows, images: Path) -> Iterator[Sample]:
    """LLaVA-CoT-100k: a sample for each exchange of a conversation; steps are summary, caption, reasoning.

    An exchange is asked with those before it (their conclusions alone) as its context.
    """
    for source, row in rows:
        turns = field(row, "conversations", source)
        key, pictures = str(field(row, "id", source)), images_of(row.get("image"), images, source)
        said: list[str] = []
        for number in range(0, len(turns) - 1, 2):
            asked, reply = turns[number], turns[number + 1]
            if (asked.get("from"), reply.get("from")) != ("human", "gpt"):
                raise DataError(f"{source}: turns {number} and {number + 1} are not of human and gpt")
            said.append(_IMAGE_MARK.sub("\n", asked["value"]).strip())
            parts = {name: _part(reply["value"], name) for name in (*_PARTS, "CONCLUSION")}
            answer = parts.pop("CONCLUSION")
            if answer is None:
                raise DataError(f"{source}: reply {number // 2} has no <CONCLUSION>")
            steps = tuple(text for text in parts.values() if text)
            yield Sample(f"{key}-{number // 2}", "\n".join(said), steps, answer, pictures, (), source)
            said.append(answer)


def _answer_of(row: Row, name: str, source: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"{source}: no {name}; the test split of A-OKVQA has no answers, use train or val")
    return row[name]


def _part(reply: str, name: str) -> str | None:
    found = re.search(rf"<{name}>(.*?)</{name}>", reply, re.DOTALL)
    return found[1].strip() if found else None
