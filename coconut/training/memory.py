"""Out of memory, said so that a person knows what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from coconut.training.watchdog import Watchdog
from coconut.types import Batch, TrainingError


@contextmanager
def explaining_memory(watchdog: Watchdog, batch: Batch, config: Any) -> Iterator[None]:
    """Turns an allocation that failed inside into an error that names phase, shapes and remedies.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"out of memory: {watchdog.where()}; the micro-batch is {shape_of(batch)}. {said}\n"
            "  What would help, the cheapest first:\n" + "".join(f"  - {text}\n" for text in remedies(config))
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of an accelerator's, torch's CPU allocator's or Python's own."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        part in text for part in ("out of memory", "can't allocate memory", "not enough memory")
    )


def shape_of(batch: Batch) -> str:
    """``4 samples x 512 columns, 13 image patches (13 x 3 x 448 x 448)``"""
    rows, columns = batch.tensors["input_ids"].shape
    text = f"{rows} samples x {columns} columns"
    pixels = batch.tensors.get("pixel_values")
    if pixels is not None:
        text += f", image patches {' x '.join(map(str, pixels.shape))}"
    return text


def remedies(config: Any) -> list[str]:
    """Settings that would need less memory, those that are in use already left out."""
    found = []
    if not config.gradient_checkpointing:
        found.append("gradient_checkpointing=true: recomputes activations, for about a third more time")
    if not (config.bf16 or config.fp16):
        found.append("bf16=true: halves weights, gradients and activations, where the device has it")
    if config.batch_size_training > 1:
        half = config.batch_size_training // 2
        text = f"batch_size_training={half} (now {config.batch_size_training})"
        if config.global_batch_size is None:
            text += f" with gradient_accumulation_steps={2 * config.gradient_accumulation_steps}"
        found.append(f"{text}: the same step in smaller micro-batches")
    if config.max_num_patches > 1:
        found.append(f"a smaller max_num_patches (now {config.max_num_patches}) or max_length: fewer columns")
    found.append("--deepspeed ds_configs/zero3.json on more ranks, or zero3_offload.json: a smaller part of the state")
    return found
