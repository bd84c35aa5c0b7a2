"""Questions with picture, truth and what each method said, for the report."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from coconut.evaluation.collect import Evaluation, Method
from coconut.evaluation.page import data_uri
from coconut.evaluation.tables import main_method
from coconut.types import CoconutError, Sample

N_EXAMPLES = {True: 3, False: 6}  # right ones and wrong ones; more is learnt from the wrong ones
MAX_IMAGE_PIXELS = 448  # a side, in the page


def examples(methods: Sequence[Method]) -> dict[str, Any] | None:
    """Some questions with picture, truth and what each method said: right and wrong ones of the main method."""
    main = main_method(methods)
    if main is None:
        return None
    order = [main, *(method for method in methods if method is not main)]
    said = {method.name: {row["key"]: row for row in method.plain[0].predictions()} for method in order}
    rows = list(said[main.name].values())
    samples = _sample_reader(main.plain[0])
    groups = []
    for correct, title in ((True, f"{main.name} is right"), (False, f"{main.name} is wrong")):
        chosen = [row for row in rows if row["correct"] is correct]
        # Those on which the methods disagree tell most.
        chosen.sort(key=lambda row: all(s.get(row["key"], row)["correct"] is correct for s in said.values()))
        cards = [_card(row, said, samples) for row in chosen[: N_EXAMPLES[correct]]]
        if cards:
            groups.append({"title": f"{title} ({len(chosen):,} of {len(rows):,})", "cards": cards})
    return {
        "intro": "Texts are what the models wrote, to the letter; thoughts are not text and do not show.",
        "groups": groups,
    }


def _sample_reader(evaluation: Evaluation) -> Callable[[int], Sample | None]:
    """Samples by index from the data that was evaluated; None where it is no longer there."""
    from coconut.data import open_dataset

    try:
        source = open_dataset(evaluation.data)
    except CoconutError:
        return lambda index: None

    def read(index: int) -> Sample | None:
        try:
            return source.read(index)
        except (CoconutError, IndexError):
            return None

    return read


def _card(row: dict[str, Any], said: dict[str, dict[str, Any]], read: Callable[[int], Sample | None]) -> dict[str, Any]:
    sample = read(row["index"])
    shown = sample.images[:2] if sample is not None and sample.key == row["key"] else ()
    answers = [
        {"method": name, "correct": rows[row["key"]]["correct"], "text": rows[row["key"]]["prediction"] or "(nothing)"}
        for name, rows in said.items()
        if row["key"] in rows
    ]
    images = [uri for uri in map(_image_uri, shown) if uri]
    return {"key": row["key"], "question": row["question"], "truth": row["answer"], "images": images, "said": answers}


def _image_uri(image: bytes | str) -> str | None:
    """A picture, decoded and encoded anew (its own bytes could be anything), no larger than the page needs."""
    from coconut.data.image import open_image

    try:
        opened = open_image(image)
    except CoconutError:
        return None
    opened.thumbnail((MAX_IMAGE_PIXELS, MAX_IMAGE_PIXELS))
    buffer = io.BytesIO()
    opened.save(buffer, format="png")
    return data_uri(buffer.getvalue())
