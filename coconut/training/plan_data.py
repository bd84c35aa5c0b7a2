"""What a run's data mean for its plan, stage by stage: the largest micro-batch, an average sample, steps an epoch.

Read from the index of the shards, no image is opened; or assumed, where there are no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from coconut.config.deepspeed import batch_geometry
from coconut.training.batches import stage_batch
from coconut.training.preview import PreviewInputs
from coconut.training.simulation import BatchShape
from coconut.training.stages import StageManager

_MOST_STEPS = 500  # of a plan that are looked at, spread evenly


@dataclass(frozen=True)
class StageShape:
    """Sizes of one stage's training data."""

    stage: int
    step_samples: int  # samples of an optimizer step, over all ranks
    largest: BatchShape  # micro-batch
    tokens: float  # of a sample, on average; image tokens included
    tiles: float
    labels: float  # label tokens at stage 0, where all steps are written
    samples: int | None = None  # of an epoch; None where it is not known
    steps: int | None = None  # of an epoch


@dataclass(frozen=True)
class DataShape:
    """Sizes of a run's training data."""

    stages: tuple[StageShape, ...]  # in order
    source: str  # where this comes from, for people

    def alike(self) -> Iterator[tuple[StageShape, ...]]:
        """Neighbouring stages whose epochs have the same steps of as many samples."""
        for _, group in groupby(self.stages, key=lambda stage: (stage.step_samples, stage.samples, stage.steps)):
            yield tuple(group)


def read_data_shape(preview: PreviewInputs, ranks: int) -> DataShape:
    """The shape of the training data as `ranks` ranks would get them.

    The text is that of stage 0 with a stage's thoughts beside it: no batch of the stage has a longer one.
    """
    shapes = tuple(_read_stage(preview, stage, ranks) for stage in preview.stages.stages)
    return DataShape(shapes, f"{preview.config.train_data_path}, {len(preview.train):,} samples")


def _read_stage(preview: PreviewInputs, stage: int, ranks: int) -> StageShape:
    split, geometry, tiles_N = preview.train, preview.geometry(ranks, stage), preview.inputs.patches
    plan = preview.inputs.train_loader(stage, preview.epoch_of(stage), 0, geometry, ranks).plan
    latents = most_latents(preview.stages, stage)
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
    tokens, tiles, labels = (float(of_N[plan.order].mean()) for of_N in (split.tokens_N, tiles_N, split.tails_N))
    return StageShape(stage, geometry.samples, largest, tokens, tiles, labels, len(plan.order), len(plan))


def assumed_data_shape(config: Any, ranks: int, *, columns: int, labels: int, tiles: int) -> DataShape:
    """The shape of data whose samples are all alike.

    Args:
        config: the run configuration, for curriculum and batches.
        ranks: of the run.
        columns: tokens of a sample, image tokens included, thoughts not.
        labels, tiles: of a sample.
    """
    stages = StageManager.from_config(config)

    def shape(stage: int) -> StageShape:
        geometry = batch_geometry(stage_batch(config, stage), ranks)
        rows, latents = geometry.micro_batch, most_latents(stages, stage)
        largest = BatchShape(rows, columns + latents + 2 * bool(latents), rows * labels, latents, rows * tiles)
        return StageShape(stage, geometry.samples, largest, columns, tiles, labels)

    return DataShape(tuple(map(shape, stages.stages)), "assumed samples, all alike")


def most_latents(stages: StageManager, stage: int) -> int:
    """Thoughts of a stage's sample at most, with those that stage mixing may bring into it."""
    is_mixed = stages.is_staged and stages.settings(stage).uniform_prob > 0
    shown = [stage, *(range(stages.max_latent_stage + 1) if is_mixed else ())]
    return max(stages.spec(shown_at).n_latents for shown_at in shown)
