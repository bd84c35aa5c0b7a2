"""What a run reads: its data sets, opened and checked once, and the loader of each stage and epoch.

train_data_path --open_dataset--> ShardReader --costs, make_plan(epoch)--> StreamLoader --> Batch
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.config.deepspeed import BatchGeometry
from coconut.data.collate import MultimodalCollator
from coconut.data.encode import SampleEncoder
from coconut.data.plan import make_plan
from coconut.data.shards import ShardReader, open_dataset
from coconut.data.stream import StreamLoader
from coconut.data.token_counts import sample_lengths, tokens_name
from coconut.training.stages import StageManager
from coconut.types import ConfigError, DataError, SourceError
from coconut.utils.distributed import get_rank, get_world_size, on_main_first
from coconut.utils.logging import get_logger

logger = get_logger(__name__)

#: Samples that are tried before a run begins, until one can be used.
MOST_LOOKED_AT = 16


@dataclass(frozen=True)
class Split:
    """One data set of a run, and what each of its samples costs (the first so many, when it is limited)."""

    reader: ShardReader
    costs_N: NDArray[np.float64]
    tails_N: NDArray[np.float64]  # tokens of steps and answer, which costs_N count too
    token_counts: str | None  # file of the counts that these are taken from; None: estimated from characters

    def __len__(self) -> int:
        return len(self.costs_N)


def open_split(config: Any, key: str, encoder: SampleEncoder, limit: int | None = None) -> Split | None:
    """The data set that configuration key `key` names, or None when it names none.

    JSON data is sharded into the cache first, once; shards of a URL come there when they are needed.

    Raises:
        DataError: the data is broken as a whole: of some samples all over it, none can be used.
        ConfigError: it holds no sample, or fewer than there are ranks.
    """
    path = getattr(config, key)
    if path is None:
        return None

    def open_path() -> ShardReader:
        return open_dataset(
            path,
            image_root=config.image_root,
            cache_dir=config.shard_cache or Path(config.save_path) / ".shards",
            allow_damage=True,
            allow_pipe=config.allow_pipe_urls,
        )

    # One process writes the cache, also where nodes share no file locks.
    on_main_first(lambda: _look_at_some(open_path(), key, encoder))
    reader = open_path()
    processor = encoder.image_processor
    num_patches = processor.num_patches if processor is not None else lambda width, height: 0
    lengths = sample_lengths(reader, encoder.tokenizer, num_patches, encoder.tokens_per_patch)
    costs_N, tails_N = (values_N[:limit] for values_N in lengths)
    if len(costs_N) < get_world_size():
        count = f"{len(costs_N)} sample{'' if len(costs_N) == 1 else 's'}"
        raise ConfigError(
            f"{key}: {path} holds {count}, fewer than the {get_world_size()} ranks of this run; "
            "give more data or start fewer ranks"
        )
    name = tokens_name(encoder.tokenizer)
    return Split(reader, costs_N, tails_N, name if name in reader.index.token_files else None)


def _look_at_some(reader: ShardReader, key: str, encoder: SampleEncoder) -> None:
    """Raises: DataError: none of a few samples can be used, so that the mistake is not one of single samples."""
    for damage in reader.damaged_shards():
        logger.warning("%s: %s; samples beyond its end are left out", key, damage)
    errors: list[DataError] = []
    indices = np.unique(np.linspace(0, len(reader) - 1, MOST_LOOKED_AT, dtype=np.int64)).tolist()
    for index in indices:
        try:
            encoder.encode(reader.read(index))
            return
        except SourceError:
            raise
        except DataError as error:
            errors.append(error)
    if errors:
        raise DataError(f"{key}: none of {len(errors)} samples that were tried can be used; the first: {errors[0]}")


class TrainingInputs:
    """Loaders for a run.

    Args:
        config: the run configuration.
        encoder: turns samples into features.
        collator: turns features into batches.
        stages: the curriculum.
        latent_ids: ids of the start, latent and end tokens.
    """

    def __init__(
        self,
        config: Any,
        encoder: SampleEncoder,
        collator: MultimodalCollator,
        stages: StageManager,
        latent_ids: tuple[int, int, int],
    ) -> None:
        self.config = config
        self.encoder = encoder
        self.collator = collator
        self.stages = stages
        self.latent_ids = latent_ids
        self.train = open_split(config, "train_data_path", encoder, config.max_train_samples)
        self.validation = open_split(config, "val_data_path", encoder, config.max_val_samples)
        self.test = open_split(config, "test_data_path", encoder)

    def train_loader(
        self, stage: int, epoch: int, start_step: int, geometry: BatchGeometry, group: int
    ) -> StreamLoader:
        """Micro-batches of one epoch from optimizer step `start_step` on; the same steps on every rank.

        `group` slots are balanced against one another (`make_plan`).
        """
        if self.train is None:
            raise ConfigError("train_data_path is not set; name the training data")
        costs_N = self.train.costs_N
        tails_N = self.train.tails_N
        plan = make_plan(
            costs_N,
            seed=self.config.seed,
            epoch=epoch,
            slots=geometry.slots,
            samples_per_step=geometry.samples,
            samples_per_epoch=self.config.samples_per_epoch,
            balance=self.config.balance,
            group=math.gcd(group, geometry.slots),
            lengths=(costs_N - tails_N, tails_N),
        )
        to_stage = partial(self._mixed, stage=stage, epoch=epoch)
        return self._loader(self.train, plan, to_stage, start_step)

    def evaluation_loader(self, split: Split, stage: int) -> StreamLoader:
        """Every sample of `split` once, at `stage`, in micro-batches of batch_size_eval."""
        world = get_world_size()
        plan = make_plan(
            split.costs_N,
            seed=self.config.seed,
            epoch=0,
            slots=world,
            samples_per_step=min(self.config.batch_size_eval * world, len(split)),
        )
        return self._loader(split, plan, partial(self._at, stage=stage), 0)

    def _loader(self, split: Split, plan: Any, to_stage: Any, start_step: int) -> StreamLoader:
        return StreamLoader(
            split.reader,
            plan,
            rank=get_rank(),
            world=get_world_size(),
            encode=self.encoder.encode,
            stage=to_stage,
            collate=self.collator.collate_batch,
            num_workers=self.config.num_workers,
            start_step=start_step,
        )

    def _at(self, features: dict[str, Any], *, stage: int) -> dict[str, Any]:
        return self.encoder.with_stage(features, self.stages.spec(stage), self.latent_ids)

    def _mixed(self, features: dict[str, Any], *, stage: int, epoch: int) -> dict[str, Any]:
        text = features["text"]
        spec = self.stages.spec_of_sample(text.key, len(text.steps), stage, seed=self.config.seed, epoch=epoch)
        return self.encoder.with_stage(features, spec, self.latent_ids)
