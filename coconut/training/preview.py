"""What the model will see: micro-batches of a stage as training makes them, taken apart again for people to read.

    configuration --open_preview--> TrainingInputs (no weights) --train_loader--> Batch --read_batch--> PreviewRow

Everything here comes out of the tensors of a `Batch`: read, planned, encoded, staged and collated by the code that a
run uses. Only the written text beside it is read from the data set again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from coconut.config.deepspeed import BatchGeometry, batch_geometry
from coconut.data.collate import MultimodalCollator
from coconut.data.encode import SampleEncoder
from coconut.data.image import ImageProcessor
from coconut.data.stage_text import build_prompt_template
from coconut.evaluation.flops import training_flops
from coconut.model.loading import load_outline
from coconut.training.batches import stage_batch
from coconut.training.inputs import Split, TrainingInputs
from coconut.training.stages import StageManager
from coconut.types import IGNORE_INDEX, Batch, ConfigError, Sample
from coconut.utils.tokenizer import load_tokenizer, special_token_ids

#: What a token of a row is for the model, in the order in which they are told apart.
KINDS = ("padding", "latent", "marker", "image", "label", "prompt")


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one kind."""

    kind: str
    text: str
    tokens: int


@dataclass(frozen=True)
class PreviewRow:
    """A row of a micro-batch."""

    key: str
    index: int  # in the data set
    stage: int  # at which it is shown: the run's, or another one that stage mixing drew
    spans: list[Span]
    sample: Sample  # as written
    steps_gone: int  # leading written steps that the text leaves out
    image_sizes: list[tuple[int, int]]  # pixels
    tiles: list[torch.Tensor]  # of each image, uint8 [P, 3, H, W]
    grids: list[tuple[int, int]]  # of each image, columns and rows of tiles
    planned_cost: float  # as the plan estimates it, in tokens

    def count(self, kind: str) -> int:
        return sum(span.tokens for span in self.spans if span.kind == kind)

    @property
    def length(self) -> int:
        """Tokens without padding."""
        return sum(span.tokens for span in self.spans) - self.count("padding")


@dataclass(frozen=True)
class PreviewBatch:
    """A micro-batch, and what it costs."""

    step: int
    slot: int
    rows: list[PreviewRow]  # the first ones, where not all are asked for
    n_rows: int
    columns: int
    n_tokens: int  # without padding
    n_labels: int
    n_patches: int
    passes: int  # through the decoder
    flops: float

    @property
    def padding(self) -> float:
        return 1 - self.n_tokens / (self.n_rows * self.columns)


@dataclass
class PreviewInputs:
    """A run's data and curriculum without its model."""

    config: Any
    tokenizer: Any
    inputs: TrainingInputs
    model_config: Any
    train: Split = field(init=False)

    def __post_init__(self) -> None:
        if self.inputs.train is None:
            raise ConfigError("train_data_path is not set; name the training data")
        self.train = self.inputs.train

    @property
    def stages(self) -> StageManager:
        return self.inputs.stages

    def epoch_of(self, stage: int) -> int:
        """The epoch that a stage begins with, when no stage before it ends early."""
        return sum(self._epochs(earlier) for earlier in self.stages.stages if earlier < stage)

    def _epochs(self, stage: int) -> int:
        settings = self.stages.settings(stage)
        if settings.epochs is not None:
            return settings.epochs
        assert settings.steps is not None
        samples = self.config.samples_per_epoch or len(self.train)
        return math.ceil(settings.steps / math.ceil(samples / self.geometry(1, stage).samples))

    def geometry(self, ranks: int, stage: int | None = None) -> BatchGeometry:
        """The optimizer step of a stage, by default the first."""
        return batch_geometry(stage_batch(self.config, self.stages.stages[0] if stage is None else stage), ranks)


def open_preview(config: Any) -> PreviewInputs:
    """Open what a run would read, without loading weights.

    Raises:
        ConfigError, DataError: as a run would.
    """
    model_id = config.load_model_path or config.model_id
    tokenizer = load_tokenizer(model_id)
    outline = load_outline(model_id, tokenizer)
    processor = ImageProcessor.from_config(config) if outline.tokens_per_patch else None
    template = build_prompt_template(tokenizer, config.prompt_format)
    ids = special_token_ids(tokenizer)
    encoder = SampleEncoder(tokenizer, processor, template, outline.tokens_per_patch, config.max_length)
    collator = MultimodalCollator(tokenizer, processor, ids[1], config.pad_to_multiple_of)
    config.update(val_data_path=None, test_data_path=None, num_workers=0)
    inputs = TrainingInputs(config, encoder, collator, StageManager.from_config(config), ids)
    return PreviewInputs(config, tokenizer, inputs, outline.base_model.config)


def preview_batches(preview: PreviewInputs, stage: int, n_rows: int, ranks: int = 1) -> Iterator[PreviewBatch]:
    """The first micro-batches of a stage, until `n_rows` rows have been given.

    Raises:
        ConfigError: the run has no such stage.
    """
    if stage not in preview.stages.stages:
        known = ", ".join(map(str, preview.stages.stages))
        raise ConfigError(f"stage is {stage}; this run has {known}")
    epoch = preview.epoch_of(stage)
    loader = preview.inputs.train_loader(stage, epoch, 0, preview.geometry(ranks, stage), ranks)
    left = n_rows
    for batch in loader:
        if left <= 0:
            return
        if batch.keys:
            slot = loader.plan.step(batch.extras["step"])[batch.extras["slot"]].tolist()
            read = read_batch(preview, batch, slot, stage, epoch, left)
            left -= len(read.rows)
            yield read


def read_batch(
    preview: PreviewInputs, batch: Batch, slot: list[int], stage: int, epoch: int, most_rows: int
) -> PreviewBatch:
    """Take a batch apart; `slot` holds the data set's indices that it was made of."""
    planned = iter(slot)  # rows keep its order; two sets may hold the same key
    tensors = batch.tensors
    mask_BL, patches = tensors["attention_mask"], tensors["num_patches"].tolist()
    ends = torch.tensor(patches).cumsum(0).tolist()
    kinds = _kinds(preview, tensors)
    rows = []
    for place, key in enumerate(batch.keys[:most_rows]):
        tiles_PCHW = tensors["pixel_values"][ends[place] - patches[place] : ends[place]] if patches[place] else None
        spans = _spans(preview.tokenizer, tensors["input_ids"][place].tolist(), kinds[place])
        index = next(index for index in planned if preview.train.reader.key(index) == key)
        rows.append(_row(preview, key, index, spans, tiles_PCHW, stage, epoch))
    n_latents = max(kinds_of_row.count("latent") for kinds_of_row in kinds)
    n_samples, columns = mask_BL.shape
    return PreviewBatch(
        step=batch.extras["step"],
        slot=batch.extras["slot"],
        rows=rows,
        n_rows=n_samples,
        columns=columns,
        n_tokens=batch.n_tokens,
        n_labels=batch.n_label_tokens,
        n_patches=sum(patches),
        passes=n_latents + 1,
        flops=training_flops(
            preview.model_config,
            batch.n_tokens,
            sum(patches),
            n_samples=n_samples,
            n_logit_tokens=batch.n_label_tokens,
            recompute=preview.config.gradient_checkpointing,
        ),
    )


def _row(
    preview: PreviewInputs,
    key: str,
    index: int,
    spans: list[Span],
    tiles_PCHW: torch.Tensor | None,
    stage: int,
    epoch: int,
) -> PreviewRow:
    reader, processor = preview.train.reader, preview.inputs.encoder.image_processor
    sample = reader.read(index)
    sizes = reader.image_sizes(index)
    seed = preview.config.seed
    spec = preview.stages.spec_of_sample(key, len(sample.steps), stage, seed=seed, epoch=epoch)
    gone = spec.n_skip_steps
    n_steps = len(sample.steps)
    tiles: list[torch.Tensor] = []
    grids: list[tuple[int, int]] = []
    if tiles_PCHW is not None and processor is not None:
        tiles = list(tiles_PCHW.split([processor.num_patches(*size) for size in sizes]))
        grids = [processor.grid(*size) for size in sizes]
    return PreviewRow(
        key=key,
        index=index,
        stage=spec.stage,
        spans=spans,
        sample=sample,
        steps_gone=n_steps if gone is None else min(gone, n_steps),
        image_sizes=sizes,
        tiles=tiles,
        grids=grids,
        planned_cost=float(preview.inputs.costs(stage)[index]),
    )


def _kinds(preview: PreviewInputs, tensors: dict[str, Any]) -> list[list[str]]:
    """The kind of every token: [B][L]."""
    start, latent, end = preview.inputs.latent_ids
    ids_BL = tensors["input_ids"]
    context = preview.inputs.encoder.template.image_context
    is_kind = {
        "padding": tensors["attention_mask"] == 0,
        "latent": ids_BL == latent,
        "marker": (ids_BL == start) | (ids_BL == end),
        "image": ids_BL == (-1 if context is None else context),
        "label": tensors["labels"] != IGNORE_INDEX,
    }
    code_BL = torch.full_like(ids_BL, KINDS.index("prompt"))
    for kind in reversed(KINDS[:-1]):  # the first that fits counts
        code_BL[is_kind[kind]] = KINDS.index(kind)
    return [[KINDS[code] for code in row] for row in code_BL.tolist()]


def _spans(tokenizer: Any, ids: list[int], kinds: list[str]) -> list[Span]:
    spans = []
    for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        span_ids = [token for _, token in group]
        text = "" if kind in ("padding", "latent", "image") else tokenizer.decode(span_ids)
        spans.append(Span(kind, text, len(span_ids)))
    return spans
