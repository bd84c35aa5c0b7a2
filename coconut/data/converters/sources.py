"""Rows of a public data set, from files that the user has downloaded or from the Hugging Face hub.

Rows of Parquet and of the hub are alike: an image is ``{"bytes": ..., "path": ...}``, never decoded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from coconut.data.sample import read_records
from coconut.types import DataError

Row = dict[str, Any]


def find(root: Path, names: Sequence[str], download: str) -> list[Path]:
    """The files of the first of ``names`` (patterns are allowed) that is there; a file given itself is taken.

    Raises:
        DataError: none is there; it says what was looked for and what to download.
    """
    if root.is_file():
        return [root]
    for name in names:
        found = sorted(root.glob(name))
        if found:
            return found
    raise DataError(f"{root} holds none of {', '.join(names)}; {download}")


def read_rows(paths: Sequence[Path]) -> Iterator[tuple[str, Row]]:
    """(source, row) of JSON, JSONL or Parquet files, one after another; the source names file and row.

    Raises:
        DataError: a file cannot be read, or a row is no object.
    """
    for path in paths:
        rows = _parquet(path) if path.suffix == ".parquet" else read_records(path)
        for number, row in rows:
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a row is an object with named fields, not {row!r:.60}")
            yield f"{path}:{number}", row


def read_object(path: Path) -> Any:
    """A JSON file that is one object, whole.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None


def hub_rows(name: str, split: str) -> Iterator[tuple[str, Row]]:
    """(source, row) of a data set on the Hugging Face hub, or in its local cache.

    Raises:
        DataError: `datasets` is not installed, or the hub has no such data set or cannot be reached.
    """
    datasets = _optional("datasets", f"to read {name} from the hub")
    try:
        data = datasets.load_dataset(name, split=split)
        for column, kind in data.features.items():
            if isinstance(kind, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # the library raises a dozen kinds, of several packages
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{name} (split {split}) cannot be loaded from the hub: {reason[0]}") from error
    for number, row in enumerate(data):
        yield f"{name}/{split}:{number}", row


def images_of(value: Any, folder: Path, source: str) -> tuple[bytes | str, ...]:
    """Images of a row's field: a path below ``folder``, ``{"bytes", "path"}``, raw bytes, a list of these, or nothing.

    Raises:
        DataError: something else.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, list):
        return tuple(image for entry in value for image in images_of(entry, folder, source))
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return (value,)
    if isinstance(value, str) and value:
        return (str(folder / value),)
    raise DataError(f"{source}: an image is a path, or bytes in Parquet, not {value!r:.60}")


def field(row: Row, name: str, source: str) -> Any:
    """A field that a row must have."""
    if row.get(name) is None:
        raise DataError(f"{source}: field {name!r} is missing; the row has {', '.join(map(repr, row))}")
    return row[name]


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    parquet = _optional("pyarrow.parquet", f"to read {path}")
    number = 0
    try:
        # Batch by batch: a file holds gigabytes of images.
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _optional(module: str, purpose: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise DataError(f"the package {package} is needed {purpose}: pip install {package}") from None
