"""Any JSON, JSONL or Parquet data, by the names of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from coconut.data.converters.sources import Row, field, images_of
from coconut.data.converters.text import sentences
from coconut.data.sample import sample_from_record
from coconut.types import DataError, Sample

COLUMNS = ("question", "steps", "answer", "image", "id", "choices")
_CUT: dict[str, Callable[[str], Iterable[str]]] = {
    "sentences": sentences,
    "lines": str.splitlines,
    "none": lambda text: [text],
}
SPLITS = tuple(_CUT)


def columns(
    rows: Iterable[tuple[str, Row]], names: Mapping[str, str], images: Path, *, split_steps: str = "sentences"
) -> Iterator[Sample]:
    """Samples of rows whose fields are called as ``names`` says (our field -> theirs; by default the same).

    Args:
        split_steps: how steps that are one text are cut: ``sentences``, ``lines``, or ``none`` (one step).
    """
    if split_steps not in SPLITS:
        raise DataError(f"split_steps is {split_steps!r}; choose one of {', '.join(SPLITS)}")
    theirs = {name: names.get(name, name) for name in COLUMNS}
    for number, (source, row) in enumerate(rows):
        for name in COLUMNS:
            if name in names:
                field(row, names[name], source)
        steps = field(row, theirs["steps"], source)
        if isinstance(steps, str):
            steps = [step.strip() for step in _CUT[split_steps](steps) if step.strip()]
        record = {"question": field(row, theirs["question"], source), "steps": steps}
        record |= {"answer": field(row, theirs["answer"], source), "choices": row.get(theirs["choices"])}
        if row.get(theirs["id"]) is not None:
            record["id"] = row[theirs["id"]]
        sample = sample_from_record(record, key=str(number), source=source)
        pictures = images_of(row.get(theirs["image"]), images, source) if "image" in names or "image" in row else ()
        yield Sample(sample.key, sample.question, sample.steps, sample.answer, pictures, sample.choices, source)
