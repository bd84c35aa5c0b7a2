"""Out of memory, said so that a person knows what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from coconut.training.watchdog import Watchdog
from coconut.types import Batch, TrainingError

_NEW_RUN = "this makes another run, so give it another name"


@contextmanager
def explaining_memory(watchdog: Watchdog, config: Any, batch: Batch | None = None) -> Iterator[None]:
    """Turns an allocation that failed inside into an error that names phase, shapes and remedies.

    Args:
        watchdog: knows the phase.
        config: says which remedies are in use already.
        batch: the micro-batch at work, in training.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, TrainingError) or not is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"out of memory: {watchdog.where()}{f'; the micro-batch is {shape_of(batch)}' if batch else ''}. {said}\n"
            "  What would help, the cheapest first:\n" + "".join(f"  - {text}\n" for text in remedies(config, batch))
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


def remedies(config: Any, batch: Batch | None = None) -> list[str]:
    """Settings that would need less memory, those that are in use already left out.

    Args:
        config: of the run.
        batch: the micro-batch of training; None where memory ran out before the steps or between them.
    """
    found = []
    rows = 0 if batch is None else len(batch.tensors["input_ids"])
    if not config.gradient_checkpointing:
        found.append("gradient_checkpointing=true: recomputes activations, for about a third more time")
    if rows > 1:
        text = f"batch_size_training={rows // 2} (this micro-batch has {rows} samples)"
        if config.global_batch_size is None:
            text += f" with gradient_accumulation_steps={2 * config.gradient_accumulation_steps}"
        found.append(f"{text}: the same step in smaller micro-batches")
    if batch is None and config.batch_size_eval > 1:
        found.append(
            f"batch_size_eval={config.batch_size_eval // 2} (now {config.batch_size_eval}), if it was validating"
        )
    found.append("--deepspeed ds_configs/zero3.json on more ranks, or zero3_offload.json: a smaller part of the state")
    if not (config.bf16 or config.fp16):
        found.append(f"bf16=true, where the device has it: halves weights, gradients and activations; {_NEW_RUN}")
    if config.max_num_patches > 1:
        found.append(f"a smaller max_num_patches (now {config.max_num_patches}): fewer columns; {_NEW_RUN}")
    return found
