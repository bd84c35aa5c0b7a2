"""What a run's data mean for its plan: the largest micro-batch, an average sample, steps an epoch.

Read from the index of the shards, no image is opened; or assumed, where there are no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coconut.config.deepspeed import BatchGeometry
from coconut.training.preview import PreviewInputs
from coconut.training.simulation import BatchShape

_MOST_STEPS = 500  # of a plan that are looked at, spread evenly


@dataclass(frozen=True)
class DataShape:
    """Sizes of a run's training data."""

    largest: BatchShape  # micro-batch
    tokens: float  # of a sample, on average; image tokens included
    tiles: float
    labels: float  # label tokens at stage 0, where all steps are written
    samples: int | None  # of an epoch; None where it is not known
    steps: int | None  # of an epoch
    source: str  # where this comes from, for people


def read_data_shape(preview: PreviewInputs, ranks: int) -> DataShape:
    """The shape of the training data as `ranks` ranks would get them.

    The text is that of stage 0 with the last stage's thoughts beside it: no stage has a longer one.
    """
    split, config, stages = preview.train, preview.config, preview.stages
    tiles_N = _tiles(preview)
    plan = preview.inputs.train_loader(stages.stages[0], 0, 0, preview.geometry(ranks), ranks).plan
    latents = max(stages.spec(stage).n_latents for stage in stages.stages)
    largest = BatchShape(1, 8, 1)
    prompts_N = split.tokens_N - split.tails_N
    for step in np.unique(np.linspace(0, len(plan) - 1, min(_MOST_STEPS, len(plan))).astype(int)).tolist():
        for slot in plan.step(step):
            if not len(slot):
                continue
            columns = int(prompts_N[slot].max() + split.tails_N[slot].max()) + latents + 2
            found = BatchShape(len(slot), columns, int(split.tails_N[slot].sum()), latents, int(tiles_N[slot].sum()))
            if found.rows * found.columns > largest.rows * largest.columns:
                largest = found
    return DataShape(
        largest,
        float(split.tokens_N.mean()),
        float(tiles_N.mean()),
        float(split.tails_N.mean()),
        len(plan.order),
        len(plan),
        f"{config.train_data_path}, {len(split):,} samples",
    )


def assumed_data_shape(geometry: BatchGeometry, columns: int, labels: int, tiles: int, latents: int) -> DataShape:
    """The shape of data whose samples are all alike.

    Args:
        geometry: how an optimizer step is cut.
        columns: tokens of a sample, image tokens included, thoughts not.
        labels, tiles: of a sample.
        latents: thoughts of the last stage.
    """
    rows = geometry.micro_batch
    largest = BatchShape(rows, columns + latents + 2 * bool(latents), rows * labels, latents, rows * tiles)
    return DataShape(largest, columns, tiles, labels, None, None, "assumed samples, all alike")


def _tiles(preview: PreviewInputs) -> NDArray[np.int64]:
    processor = preview.inputs.encoder.image_processor
    if processor is None:
        return np.zeros(len(preview.train), dtype=np.int64)
    return preview.train.reader.patches(processor.num_patches)
