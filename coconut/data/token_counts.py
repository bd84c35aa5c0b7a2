"""Tokens of every sample by one tokenizer, counted once and kept beside the index.

    tokens.HASH.npy    uint32 [samples, 2]: tokens of the question; of steps, answer and end of sequence together

HASH is the tokenizer's: a run whose tokenizer has another one estimates tokens from characters instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.data.shard_index import MANIFEST, file_sha256, fsync_path, read_manifest
from coconut.data.shard_survey import Say
from coconut.data.shard_tar import write_fault
from coconut.data.shard_writer import output_folder, write_manifest
from coconut.data.shards import ShardReader
from coconut.data.stage_text import encode_text
from coconut.data.workers import run_tasks
from coconut.types import DataError, PromptTemplate

_CHUNK = 1024  # samples of one task


def tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits of what decides its ids: the whole pipeline of a fast tokenizer, else vocabulary and class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__}\0{text}".encode()).hexdigest()[:16]


def tokens_name(tokenizer: Any) -> str:
    return f"tokens.{tokenizer_hash(tokenizer)}.npy"


def sample_lengths(
    reader: ShardReader, tokenizer: Any, num_patches: Callable[[int, int], int], tokens_per_patch: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens of every sample, image tokens included, and of its steps and answer alone; float64 [samples] each.

    Counted if that was done for this tokenizer, else estimated. The prompt's template, which all share, is left out.
    """
    name = tokens_name(tokenizer)
    if name not in reader.index.token_files:
        return reader.costs(num_patches, tokens_per_patch), reader.tail_tokens()
    counts = np.load(reader.directory / name, mmap_mode="r")
    if counts.shape != (len(reader), 2):
        raise DataError(f"{reader.directory / name} is not of this set; remove it, and its entry in the manifest")
    patches = reader.index.patches(num_patches) if len(reader.index.images) else np.zeros(len(reader))
    return counts.sum(axis=1, dtype=np.float64) + patches * float(tokens_per_patch), counts[:, 1].astype(np.float64)


def count_tokens(directory: str | Path, tokenizer: Any, *, n_workers: int = 1, say: Say = lambda *_: None) -> Path:
    """Count, unless that was done, and write the counts beside the index.

    Raises:
        DataError: no shards are there, a sample cannot be read, or the folder cannot be written.
    """
    directory = Path(directory)
    reader = ShardReader(directory)
    path = directory / tokens_name(tokenizer)
    if path.name in reader.index.token_files:
        return path
    counts = np.zeros((len(reader), 2), dtype="<u4")
    starts = range(0, len(reader), _CHUNK)
    count = partial(_count, reader=reader, tokenizer=tokenizer)
    for n_done, (start, values) in enumerate(run_tasks(count, starts, min(n_workers, len(starts))), start=1):
        counts[start : start + len(values)] = values
        say("counting tokens", n_done, len(starts), min(n_done * _CHUNK, len(reader)))
    temporary = directory / f".{path.name}.tmp"
    with output_folder(directory):
        try:
            with temporary.open("wb") as file:
                np.save(file, counts)
            fsync_path(temporary)
            entry = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}
            temporary.replace(path)
            manifest = read_manifest(directory)
            manifest["tokens"] = manifest.get("tokens", {}) | {path.name: entry}
            write_manifest(directory, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise write_fault(error, directory / MANIFEST) from None
    return path


def _count(start: int, reader: ShardReader, tokenizer: Any) -> tuple[int, NDArray[np.uint32]]:
    """Tokens of one chunk, by the code that encodes samples for training; images are left to the run."""
    plain = PromptTemplate()
    values = []
    for index in range(start, min(start + _CHUNK, len(reader))):
        sample = dataclasses.replace(reader.read(index), images=())
        try:
            text = encode_text(sample, tokenizer, plain)
        except DataError:  # a run leaves such a sample out, and says why; it costs nothing
            values.append((0, 0))
            continue
        values.append((len(text.prompt), sum(map(len, text.steps)) + len(text.answer)))
    return start, np.array(values, dtype=np.uint32)
