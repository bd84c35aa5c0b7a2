"""record -> Sample: the JSON form of a problem, and every fault it can have, named.

    {"question": "start a4 ?", "steps": ["blue up a3", ...], "answer": "red",
     "image": "images/000017.png", "id": "train-17", "choices": [...]}

``question``, ``steps`` (a list, may be empty) and ``answer`` are required. ``image`` (or ``images``) is a
path, a list of paths, or absent; paths are relative to image_root, by default the folder of the data file.
``direct_answers`` holds the answers of several people (VQA, A-OKVQA), for soft scores.
``id`` is unique; without one the record's number is. Other fields are left alone. A file is a JSON list of
records, or JSONL: one record a line. Records are counted from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from coconut.types import DataError, Sample

REQUIRED_FIELDS = ("question", "steps", "answer")
#: Faults of one file that are spelled out in an error; the rest is counted.
MAX_LISTED = 10


def sample_from_record(record: Any, *, key: str, source: str = "", image_root: str | Path | None = None) -> Sample:
    """Check one record and make it a Sample.

    Args:
        record: what the JSON holds.
        key: the sample's key where the record has no ``id``.
        source: names the record in errors, e.g. ``train.json:17``.
        image_root: folder that relative image paths start from; None leaves them as they are.

    Raises:
        DataError: naming source and field.
    """
    if not isinstance(record, dict):
        raise DataError(f"{source}: a record is a JSON object with {_listed(REQUIRED_FIELDS)}, not {_kind(record)}")
    missing = [name for name in REQUIRED_FIELDS if record.get(name) is None]
    if missing:
        raise DataError(f"{source}: field {_listed(missing)} is missing; a record needs {_listed(REQUIRED_FIELDS)}")
    question = _text(record["question"], "question", source)
    if not question.strip():
        raise DataError(f"{source}: field 'question' is empty")
    images = record.get("image", record.get("images"))
    paths = _texts([images] if isinstance(images, str) else images, "image", source)
    if image_root is not None:
        paths = tuple(str(Path(image_root) / path) for path in paths)
    identity = record.get("id", key)
    return Sample(
        key=identity if isinstance(identity, str) and identity else _text(identity, "id", source) or key,
        question=question,
        steps=_texts(record["steps"], "steps", source),
        answer=_text(record["answer"], "answer", source),
        images=paths,
        choices=_texts(record.get("choices"), "choices", source),
        references=_texts(record.get("direct_answers"), "direct_answers", source),
        source=source,
    )


def record_from_sample(sample: Sample, images: Iterable[str] = ()) -> dict[str, Any]:
    """The record of a sample whose images lie at ``images`` (by default, where they are now)."""
    paths = list(images) or [image for image in sample.images if isinstance(image, str)]
    record: dict[str, Any] = {
        "id": sample.key,
        "question": sample.question,
        "steps": list(sample.steps),
        "answer": sample.answer,
    }
    if paths:
        record["image"] = paths
    lists = {"choices": sample.choices, "direct_answers": sample.references}
    return record | {name: list(values) for name, values in lists.items() if values}


def read_records(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, record) of a JSON or JSONL file; the suffix ``.jsonl`` or ``.ndjson`` tells JSONL.

    Raises:
        DataError: the file is missing, not UTF-8, not JSON (with its line), or not a list.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist") from None
    except IsADirectoryError:
        raise DataError(
            f"data file {path} is a folder; a JSON or JSONL file is read here, shards by open_dataset"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix in (".jsonl", ".ndjson"):
        # Split at line feeds alone: JSON strings may hold the other characters that splitlines() splits at.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        for index, (number, line) in enumerate(lines):
            try:
                yield index, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error.msg} (column {error.colno})") from None
            except RecursionError:
                raise DataError(f"{path}, line {number}: nested too deeply to be a record") from None
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be a list of records") from None
    if not isinstance(records, list):
        raise DataError(f"{path} holds {_kind(records)}; a data file is a JSON list of records, or JSONL")
    yield from enumerate(records)


def read_samples(
    path: str | Path, *, image_root: str | Path | None = None, max_size: int | None = None
) -> list[Sample]:
    """Read a JSON or JSONL file whole, and refuse it whole: every fault is listed in one error.

    Args:
        image_root: folder of the images; None is the folder of the data file.
        max_size: read no more than so many records.

    Raises:
        DataError: an unreadable file, zero records, records with faults, repeated keys, missing images.
    """
    path = Path(path)
    root = Path(image_root) if image_root is not None else path.parent
    samples: list[Sample] = []
    faults: list[str] = []
    seen: dict[str, str] = {}
    for index, record in read_records(path):
        if max_size is not None and index >= max_size:
            break
        source = f"{path}:{index}"
        try:
            sample = sample_from_record(record, key=str(index), source=source, image_root=root)
        except DataError as error:
            faults.append(str(error))
            continue
        if sample.key in seen:
            faults.append(f"{source}: id {sample.key!r} is that of {seen[sample.key]} too")
        seen[sample.key] = source
        samples.append(sample)
    faults += missing_images(samples)
    if faults:
        raise DataError(summary(f"{path} has {len(faults)} faults", faults))
    if not samples:
        raise DataError(f"{path} holds zero samples")
    return samples


def missing_images(samples: Iterable[Sample]) -> list[str]:
    """A line for each image file that does not exist."""
    return [
        f"{sample.source or sample.key}: image {image} does not exist (is image_root right?)"
        for sample in samples
        for image in sample.images
        if isinstance(image, str) and not Path(image).is_file()
    ]


def summary(headline: str, faults: list[str]) -> str:
    """One line for one or many faults, of which the first few are spelled out."""
    if len(faults) == 1:
        return faults[0]
    rest = [f"... and {len(faults) - MAX_LISTED} more"] if len(faults) > MAX_LISTED else []
    return f"{headline}: " + "; ".join(faults[:MAX_LISTED] + rest)


def _text(value: Any, field: str, source: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # an answer or id written as a number
    if not isinstance(value, str):
        raise DataError(f"{source}: field '{field}' must be text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{source}: field '{field}' holds half a surrogate pair, which is no character") from None
    return value


def _texts(value: Any, field: str, source: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{source}: field '{field}' must be a list of texts, not {_kind(value)}")
    return tuple(_text(entry, field, source) for entry in value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
