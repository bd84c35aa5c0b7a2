"""Samples -> OUT/SPLIT.json, and OUT/images/ for pictures that were inside other files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from coconut.data.image import image_header
from coconut.data.sample import missing_images, record_from_sample, sample_from_record, summary
from coconut.types import DataError, Sample

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def write_split(samples: Iterable[Sample], out: Path, split: str) -> int:
    """Write a split whole or not at all; returns the number of samples.

    Pictures that are files stay where they are and are named by their path relative to ``out``.

    Raises:
        DataError: zero samples, a repeated key, pictures that are not there, or an unusable record.
    """
    records, listed, seen = [], [], set()
    for number, sample in enumerate(samples):
        if sample.key in seen:
            raise DataError(f"{sample.source}: the id {sample.key!r} was used by an earlier sample")
        seen.add(sample.key)
        listed.append(sample)
        paths = [
            _place(image, out, split, f"{number:07d}-{place}-{sample.key}", sample)
            for place, image in enumerate(sample.images)
        ]
        record = record_from_sample(sample, paths)
        sample_from_record(record, key=sample.key, source=sample.source)  # what reads it later must accept it
        records.append(record)
    if not records:
        raise DataError(f"zero samples for {out / split}.json")
    missing = missing_images(listed)
    if missing:
        raise DataError(summary(f"{len(missing)} images are not there", missing))
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f".{split}.json.tmp"
    unfinished.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(out / f"{split}.json")
    return len(records)


def _place(image: bytes | str, out: Path, split: str, stem: str, sample: Sample) -> str:
    if isinstance(image, str):
        return os.path.relpath(image, out)
    try:
        suffix = image_header(image)[2]
    except DataError as error:
        raise DataError(f"{sample.source} (id {sample.key}): {error}") from None
    path = out / "images" / split / f"{_UNSAFE.sub('_', stem)[:100]}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    return path.relative_to(out).as_posix()
