"""Random access to the records of a JSON or JSONL file, so that several processes can each read a part.

JSONL: one pass notes where each line begins; a range of records is then one read
JSON list: parsed once, whole; processes forked afterwards share it
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.data.sample import read_records
from coconut.types import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawRecord:
    """A record as the file holds it, or why it cannot be read."""

    index: int  # counted from 0
    where: str  # names file and record, and in JSONL the line
    value: Any
    fault: str = ""


class RecordFile:
    """The records of a data file, by number.

    Raises:
        DataError: the file is missing or unreadable, or a JSON file that is not a list. (A broken line of a JSONL
            file is a fault of its record.)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records: list[Any] = []
        self._starts, self._lines = array("q"), array("q")  # bytes, and line numbers from 1
        if self.path.suffix in JSONL_SUFFIXES:
            self._find_lines()
        else:
            self._records = [record for _, record in read_records(self.path)]

    def __len__(self) -> int:
        return len(self._records) or len(self._lines)

    def read(self, first: int, last: int) -> Iterator[RawRecord]:
        """Records first .. last - 1."""
        if self._records:
            for index in range(first, last):
                yield RawRecord(index, f"{self.path}:{index}", self._records[index])
            return
        with self.path.open("rb") as file:
            for index in range(first, last):
                file.seek(self._starts[index])
                yield self._parsed(index, file.readline())

    def _parsed(self, index: int, line: bytes) -> RawRecord:
        number = self._lines[index]
        where = f"{self.path}:{index} (line {number})"
        try:
            return RawRecord(index, where, json.loads(line.decode()))
        except UnicodeDecodeError as error:
            fault = f"not UTF-8 text: {error.reason} (byte {error.start})"
        except json.JSONDecodeError as error:
            fault = f"not JSON: {error.msg} (column {error.colno})"
        except RecursionError:
            fault = "nested too deeply to be a record"
        return RawRecord(index, where, None, f"{self.path}, line {number}: {fault}; mend or remove the line")

    def _find_lines(self) -> None:
        try:
            with self.path.open("rb") as file:
                position = 0
                for number, line in enumerate(file, start=1):
                    skipped = len(_BYTE_ORDER_MARK) if number == 1 and line.startswith(_BYTE_ORDER_MARK) else 0
                    if line[skipped:].strip():
                        self._starts.append(position + skipped)
                        self._lines.append(number)
                    position += len(line)
        except FileNotFoundError:
            raise DataError(f"data file {self.path} does not exist") from None
        except OSError as error:
            raise DataError(f"data file {self.path} cannot be read: {error.strerror}") from None
