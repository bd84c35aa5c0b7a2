"""Tokens of every sample by one tokenizer, counted once and kept beside the index.

    tokens.HASH.npy    uint32 [samples, 2]: tokens of the question; of steps, answer and end of sequence together

HASH is the tokenizer's: a run whose tokenizer has another one estimates tokens from characters instead.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.data.shard_build import Say
from coconut.data.shard_index import MANIFEST, ShardIndex, file_sha256, fsync_path, read_manifest
from coconut.data.shard_tar import write_fault
from coconut.data.shard_writer import output_folder, write_manifest
from coconut.data.shards import ShardReader
from coconut.data.stage_text import encode_text
from coconut.data.workers import run_tasks
from coconut.types import PromptTemplate

_CHUNK = 1024  # samples of one task


def tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits of what decides its ids: the whole pipeline of a fast tokenizer, else vocabulary and class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__}\0{text}".encode()).hexdigest()[:16]


def tokens_name(tokenizer: Any) -> str:
    return f"tokens.{tokenizer_hash(tokenizer)}.npy"


def load_token_counts(index: ShardIndex, tokenizer: Any) -> NDArray[np.uint32] | None:
    """Tokens by this tokenizer, uint32 [samples, 2], memory-mapped; None if they were not counted."""
    name = tokens_name(tokenizer)
    if name not in index.token_files:
        return None
    counts = np.asarray(np.load(index.directory / name, mmap_mode="r"))
    return counts if counts.shape == (len(index), 2) else None


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
        text = encode_text(reader.read(index), tokenizer, plain)
        values.append((len(text.prompt), sum(map(len, text.steps)) + len(text.answer)))
    return start, np.array(values, dtype=np.uint32)
