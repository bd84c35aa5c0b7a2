"""Fits the cost of a micro-batch to the machine: time = fixed + tokens + patches + latent passes, each with a factor.

    training data --random micro-batches of several stages, some without pictures--> timed forward and backward
                  --least squares on relative errors--> CostFit

Other things cost time too (attention grows with the square of the length, ZeRO's communication is left out); how much
the fit misses is measured on micro-batches that it was not made from.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from coconut.model import MultimodalCoconut
from coconut.training.preview import PreviewInputs
from coconut.training.validation import to_device
from coconut.types import Batch, DataError

#: Micro-batches that are run before any is timed, and the fewest that a fit is made from.
_WARM_UP, _FEWEST = 3, 40
#: Share of the micro-batches whose pictures are left out: else tokens and patches go together.
_WITHOUT_PICTURES = 0.3


@dataclass(frozen=True)
class Measured:
    """A micro-batch and its time."""

    tokens: int  # rows x columns, padding included
    patches: int
    latents: int  # rows x latent passes
    passes: int  # latent passes
    seconds: float


@dataclass(frozen=True)
class CostFit:
    """What the plan needs, and how well it predicts."""

    cost_per_patch: float  # in tokens
    cost_per_latent_pass: float  # of one row, in tokens
    seconds_per_token: float
    error: float  # of the predicted time of other micro-batches: median, relative
    error_of_tokens: float  # the same where tokens alone predict
    n_measured: int


def measure(preview: PreviewInputs, model: MultimodalCoconut, seconds: float) -> list[Measured]:
    """Time micro-batches of 1 to twice `batch_size_training` rows for about so many seconds, at least `_FEWEST`."""
    if preview.config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    clock = _clock(model.device)
    end, found = time.perf_counter() + seconds, list[Measured]()
    for number, (batch, passes) in enumerate(_batches(preview)):
        if number >= _WARM_UP + _FEWEST and time.perf_counter() > end:
            break
        inputs, took = to_device(batch, model.device), float("inf")
        for _ in range(2):  # the better of two: what disturbs only ever adds
            begin = clock()
            model(**inputs, loss_only=True).loss.backward()
            took = min(took, clock() - begin)
            model.zero_grad(set_to_none=True)
        rows, columns = batch.tensors["input_ids"].shape
        patches = int(batch.tensors["num_patches"].sum())
        if number >= _WARM_UP:
            found.append(Measured(rows * columns, patches, rows * passes, passes, took))
    return found


def fit_costs(measured: Sequence[Measured]) -> CostFit:
    """Fit on all; the errors are those of a fit on every second one, for the others."""
    whole = _Model(measured)
    others = measured[1::2]
    half, tokens_alone = _Model(measured[::2]), _Model(measured[::2], tokens_alone=True)
    per_token, per_patch, per_latent = whole.factors[1:4].tolist()
    if per_token <= 0:
        raise DataError("no time could be laid to tokens: the micro-batches are too alike, or the machine is too busy")
    return CostFit(
        per_patch / per_token, per_latent / per_token, per_token, half.error(others), tokens_alone.error(others),
        len(measured),
    )  # fmt: skip


class _Model:
    """Factors that are at least 0: fixed time, a token, a patch, a row's latent pass, a latent pass."""

    def __init__(self, measured: Sequence[Measured], tokens_alone: bool = False) -> None:
        features, seconds = _features(measured)
        kept = [0, 1] if tokens_alone else [i for i in range(features.shape[1]) if features[:, i].any()]
        self.factors = np.zeros(features.shape[1])
        while kept:  # a factor below 0 is noise: without it once more
            solution, *_ = np.linalg.lstsq(features[:, kept] / seconds[:, None], np.ones(len(seconds)), rcond=None)
            if (solution >= 0).all():
                self.factors[kept] = solution
                break
            del kept[int(np.argmin(solution))]

    def error(self, measured: Sequence[Measured]) -> float:
        features, seconds = _features(measured)
        return float(np.median(np.abs(features @ self.factors / seconds - 1)))


def _features(measured: Sequence[Measured]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = [(1, one.tokens, one.patches, one.latents, one.passes) for one in measured]
    return np.array(rows, dtype=np.float64), np.array([one.seconds for one in measured])


def _batches(preview: PreviewInputs) -> Iterator[tuple[Batch, int]]:
    """Micro-batches of random samples, endlessly, each with its number of latent passes."""
    draw = random.Random(0)
    inputs, reader = preview.inputs, preview.train.reader
    stages = sorted({preview.stages.stages[0], *preview.stages.stages[-2:]})
    failed = 0
    while True:
        features = []
        spec = preview.stages.spec(draw.choice(stages))
        without_pictures = draw.random() < _WITHOUT_PICTURES
        for _ in range(draw.randint(1, 2 * preview.config.batch_size_training)):
            try:
                sample = reader.read(draw.randrange(len(reader)))
                sample = replace(sample, images=()) if without_pictures else sample
                features.append(inputs.encoder.with_stage(inputs.encoder.encode(sample), spec, inputs.latent_ids))
            except DataError:  # a run names it
                failed += 1
                if failed > len(reader):
                    raise
        if features:
            yield inputs.collator.collate_batch(features), max(one["n_latents"] for one in features)


def _clock(device: torch.device) -> Callable[[], float]:
    """Wall time on a GPU, else the processor's: others use it too."""

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    if device.type == "cuda":
        return synchronized
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter
