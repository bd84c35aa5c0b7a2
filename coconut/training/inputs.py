"""What a run reads: its data sets, opened and checked once, and the loader of each stage and epoch.

train_data_path --open_dataset--> ShardSets --costs, make_plan(epoch)--> StreamLoader --> Batch
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coconut.config.data_paths import data_mixture
from coconut.config.deepspeed import BatchGeometry
from coconut.data.collate import MultimodalCollator
from coconut.data.encode import SampleEncoder
from coconut.data.order import MixturePart, share_out
from coconut.data.plan import make_plan
from coconut.data.shard_sets import ShardSets
from coconut.data.shards import ShardReader, open_dataset
from coconut.data.stream import StreamLoader
from coconut.data.token_counts import sample_lengths, tokens_name
from coconut.training.stages import StageManager
from coconut.types import ConfigError, DataError, SourceError
from coconut.utils.distributed import all_gather_object, get_rank, get_world_size, on_main_first
from coconut.utils.logging import get_logger

logger = get_logger(__name__)

#: Samples that are tried before a run begins, until one can be used.
MOST_LOOKED_AT = 16


@dataclass(frozen=True)
class Split:
    """The data of one split of a run, and how long its samples are (the first so many of a set, when it is limited)."""

    reader: ShardSets
    tokens_N: NDArray[np.float64]  # of each sample, image tokens included
    tails_N: NDArray[np.float64]  # tokens of steps and answer, which tokens_N count too
    #: File that the tokens are taken from; None: estimated from characters. Of several sets, that of each.
    token_counts: str | dict[str, str | None] | None
    digests: dict[str, str]  # of each set (`ShardIndex.digest`)

    def __len__(self) -> int:
        return len(self.tokens_N)


def open_split(config: Any, key: str, encoder: SampleEncoder, limit: int | None = None) -> Split | None:
    """The data set that configuration key `key` names, or None when it names none; see `open_sets`."""
    path = getattr(config, key)
    return None if path is None else open_sets(config, key, [path], encoder, limit)


def open_training(config: Any, stages: StageManager, encoder: SampleEncoder) -> Split | None:
    """All training data of a run, of all its stages; None when there are none. See `open_sets`.

    Raises:
        ConfigError: the weight of a set gives it less than a sample of an epoch.
    """
    mixtures = {stage: training_mixture(config, stages, stage) for stage in stages.stages}
    paths = sorted({path for mixture in mixtures.values() for path in mixture})
    if not paths:
        return None
    split = open_sets(config, "train_data_path", paths, encoder, config.max_train_samples)
    for stage, mixture in mixtures.items():
        length = config.samples_per_epoch or sum(split.reader.sizes[path] for path in mixture)
        for path, count in zip(mixture, share_out(list(mixture.values()), length), strict=True):
            if count == 0:
                raise ConfigError(
                    f"train_data_path: the weight of {path}, {mixture[path]:g} of {sum(mixture.values()):g}, is less "
                    f"than one sample of an epoch of {length} (stage {stage}); raise it, or samples_per_epoch"
                )
    return split


def training_mixture(config: Any, stages: StageManager, stage: int) -> dict[str, float]:
    """Weight of each training set in a stage."""
    own = stages.has_own_settings
    last = min(stage, config.max_latent_stage)
    return data_mixture(config.stage_setting(last, "train_data_path") if own else config.train_data_path)


def open_sets(config: Any, key: str, paths: Iterable[str], encoder: SampleEncoder, limit: int | None = None) -> Split:
    """Open data sets, as one split.

    JSON data is sharded into the cache first, once; shards of a URL come there when they are needed.

    Args:
        key: the configuration key that names them.
        limit: use only the first so many samples of each.

    Raises:
        DataError: a set is broken as a whole: of some samples all over it, none can be used.
        ConfigError: together they hold no sample, or fewer than there are ranks.
    """

    def open_path(path: str) -> ShardReader:
        return open_dataset(
            path,
            image_root=config.image_root,
            cache_dir=config.shard_cache or Path(config.save_path) / ".shards",
            allow_damage=True,
            allow_pipe=config.allow_pipe_urls,
        )

    def look_at(path: str) -> None:
        _look_at_some(open_path(path), key, encoder)

    processor, name = encoder.image_processor, tokens_name(encoder.tokenizer)
    num_patches = processor.num_patches if processor is not None else lambda width, height: 0
    readers: dict[str, ShardReader] = {}
    counts: dict[str, str | None] = {}
    lengths: list[list[NDArray[np.float64]]] = []
    for path in paths:
        # One process writes the cache, also where nodes share no file locks.
        on_main_first(partial(look_at, path))
        reader = readers[path] = open_path(path)
        counts[path] = name if name in reader.index.token_files else None
        of_set = sample_lengths(reader, encoder.tokenizer, num_patches, encoder.tokens_per_patch)
        lengths.append([values_N[:limit] for values_N in of_set])
    tokens_N, tails_N = (np.concatenate(values) for values in zip(*lengths, strict=True))
    if len(tokens_N) < get_world_size():
        count = f"{len(tokens_N)} sample{'' if len(tokens_N) == 1 else 's'}"
        raise ConfigError(
            f"{key}: {' and '.join(readers)} holds {count}, fewer than the {get_world_size()} ranks of this run; "
            "give more data or start fewer ranks"
        )
    digests = {path: reader.index.digest() for path, reader in readers.items()}
    if any(others != digests for others in all_gather_object(digests)):
        raise DataError(
            f"{key}: {' and '.join(readers)} is not the same data on every rank; copy it to all machines anew"
        )
    token_counts = counts if len(counts) > 1 else next(iter(counts.values()))
    return Split(ShardSets(readers, limit), tokens_N, tails_N, token_counts, digests)


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
        self.train = open_training(config, stages, encoder)
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
        plan = make_plan(
            self.costs(stage),
            seed=self.config.seed,
            epoch=epoch,
            slots=geometry.slots,
            samples_per_step=geometry.samples,
            samples_per_epoch=self.config.samples_per_epoch,
            balance=self.config.balance,
            group=math.gcd(group, geometry.slots),
            lengths=(self.train.tokens_N - self.train.tails_N, self.train.tails_N),
            parts=self.parts(stage),
        )
        to_stage = partial(self._mixed, stage=stage, epoch=epoch)
        return self._loader(self.train, plan, to_stage, start_step)

    def costs(self, stage: int) -> NDArray[np.float64]:
        """What each training sample costs at a stage, in tokens: float64 [samples].

        A latent pass computes a column of every row, whether that row has a thought there or not: so each sample costs
        as many passes as the one with the most thoughts.
        """
        assert self.train is not None
        spec, steps = self.stages.spec(stage), int(self.train.reader.n_steps().max())
        passes = spec.n_latents if spec.pad_latent_to_max else min(spec.n_latents, spec.c_thought * steps)
        costs = self.train.tokens_N + self.config.cost_per_latent_pass * passes
        return costs + self.config.cost_per_patch * self.patches if self.config.cost_per_patch else costs

    @cached_property
    def patches(self) -> NDArray[np.int64]:
        """Image tiles of every training sample."""
        assert self.train is not None
        processor = self.encoder.image_processor
        return self.train.reader.patches(processor.num_patches if processor is not None else lambda width, height: 0)

    def parts(self, stage: int) -> list[MixturePart]:
        """The training sets of a stage, as parts of the whole training data."""
        assert self.train is not None
        sets = self.train.reader
        mixture = training_mixture(self.config, self.stages, stage)
        return [MixturePart(sets.first[path], sets.sizes[path], weight) for path, weight in mixture.items()]

    def evaluation_loader(self, split: Split, stage: int) -> StreamLoader:
        """Every sample of `split` once, at `stage`, in micro-batches of batch_size_eval."""
        world = get_world_size()
        plan = make_plan(
            split.tokens_N,
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
