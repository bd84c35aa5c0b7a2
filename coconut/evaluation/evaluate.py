"""Ask a model every question of a data set, greedily, and score what it says.

    indices --batch b, fixed by index--> rank b % W --> prompts --generate, once--> texts --score--> gathered by index

Which samples share a batch depends on the batch size alone, so any number of ranks gives the same numbers. All ranks
make the same number of generate calls, with inert batches where one has less to do: under ZeRO-3 a rank that called
less often would stop the others for ever.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from coconut.evaluation.interventions import SampleSource, image_donors, noise_like_thoughts
from coconut.evaluation.result import EvaluationOptions, EvaluationResult, Prediction
from coconut.evaluation.score import exact_match, extract_answer
from coconut.types import Batch, DataError, Sample, StageSpec
from coconut.utils.distributed import all_gather_object, all_reduce_sum, get_rank, get_world_size, is_main_process
from coconut.utils.logging import get_logger

if TYPE_CHECKING:
    from coconut.data.collate import MultimodalCollator
    from coconut.data.encode import SampleEncoder
    from coconut.model.coconut import MultimodalCoconut

logger = get_logger(__name__)

_SECONDS_BETWEEN_LINES = 15.0


def evaluate(
    model: MultimodalCoconut,
    source: SampleSource,
    *,
    encoder: SampleEncoder,
    collator: MultimodalCollator,
    tokenizer: Any,
    spec: StageSpec,
    options: EvaluationOptions | None = None,
) -> EvaluationResult:
    """Generate and score; call it on every rank at the same point, each gets the whole result.

    Args:
        model: the model itself (an engine's ``module``), on any device.
        source: samples by index; the same on every rank.
        encoder: turns a sample into features, and features into those of a stage.
        collator: builds batches of prompts.
        tokenizer: decodes what was generated.
        spec: curriculum stage at which the questions are put.
        options: how to ask; by default all samples, as they are.

    Raises:
        DataError: there is nothing to evaluate, or not one sample can be read.
    """
    options = options or EvaluationOptions()
    n_samples = min(len(source), options.limit or len(source))
    if n_samples == 0:
        raise DataError("the data set to evaluate on is empty")
    donors = image_donors(source, n_samples, options.seed) if options.shuffle_images else None
    size = options.batch_size
    batches = [range(first, min(first + size, n_samples)) for first in range(0, n_samples, size)]
    rank, world = get_rank(), get_world_size()
    mine: list[Prediction] = []
    seconds, said_at = 0.0, time.monotonic()
    for round_start in range(0, len(batches), world):
        number = round_start + rank
        indices = batches[number] if number < len(batches) else range(0)
        asked = _prepare(indices, source, encoder, spec, model.latent_ids, donors)
        batch = collator.collate_prompts([item.features for item in asked if item.features is not None])
        started = time.perf_counter()
        texts_ids = _generate(model, batch, options)
        seconds += time.perf_counter() - started if batch.keys else 0.0
        mine += _score(asked, texts_ids, batch, tokenizer, model.eos_token_id)
        if is_main_process() and time.monotonic() - said_at > _SECONDS_BETWEEN_LINES:
            said_at = time.monotonic()
            logger.info("evaluated %d of %d samples", min((round_start + world) * size, n_samples), n_samples)
    everyone: list[list[Prediction]] = all_gather_object(mine)
    predictions = sorted((p for part in everyone for p in part), key=lambda p: p.index)
    assert [p.index for p in predictions] == list(range(n_samples)), "a sample was asked twice or never"
    failed = [p for p in predictions if p.error is not None]
    if len(failed) == n_samples:
        raise DataError(f"none of {n_samples} samples could be read; the first: {failed[0].error}")
    if failed and is_main_process():
        count = f"{len(failed)} of {n_samples}"
        logger.warning("%s samples could not be read and count as wrong; the first: %s", count, failed[0].error)
    return EvaluationResult(tuple(predictions), spec, options, all_reduce_sum([seconds])[0])


@dataclass(frozen=True)
class _Asked:
    """A sample on its way to the model; without features when it could not be read."""

    index: int
    sample: Sample | None
    features: dict[str, Any] | None
    images_from: str | None = None
    error: str | None = None


def _prepare(
    indices: range,
    source: SampleSource,
    encoder: SampleEncoder,
    spec: StageSpec,
    latent_ids: tuple[int, int, int],
    donors: dict[int, int] | None,
) -> list[_Asked]:
    asked = []
    for index in indices:
        sample, images_from = None, None
        try:
            sample = source.read(index)
            if donors is not None and index in donors:
                donor = source.read(donors[index])
                sample, images_from = dataclasses.replace(sample, images=donor.images), donor.key
            features = encoder.with_stage(encoder.encode(sample), spec, latent_ids)
            asked.append(_Asked(index, sample, features, images_from))
        except DataError as error:  # counted and named, never dropped; and no rank may leave the others waiting
            asked.append(_Asked(index, sample, None, images_from, str(error)))
    return asked


def _generate(model: MultimodalCoconut, batch: Batch, options: EvaluationOptions) -> list[list[int]]:
    tensors = {name: value.to(model.device) for name, value in batch.tensors.items() if isinstance(value, Tensor)}
    transform = None
    if options.thoughts == "noise" and batch.keys:
        transform = noise_like_thoughts(tensors["input_ids"], model.latent_ids[1], batch.keys, options.seed)
    ids_BT = model.generate(
        pixel_values=tensors.get("pixel_values"),
        input_ids=tensors["input_ids"],
        attention_mask=tensors["attention_mask"],
        num_patches=tensors.get("num_patches"),
        wrap_prompt=False,  # prompts are complete, also those of a stage without any special token
        thought_transform=transform,
        do_sample=False,
        max_new_tokens=options.max_new_tokens,
    )
    rows: list[list[int]] = ids_BT.tolist()
    return rows


def _score(
    asked: list[_Asked], texts_ids: list[list[int]], batch: Batch, tokenizer: Any, eos_token_id: int
) -> list[Prediction]:
    predictions = []
    row = 0  # of the batch; samples that could not be read have none
    lengths = batch.tensors["attention_mask"].sum(1).tolist()
    for item in asked:
        if item.features is None or item.sample is None:
            predictions.append(_failure(item))
            continue
        ids, target_ids = texts_ids[row], list(batch.extras["targets"][row])
        n_generated = ids.index(eos_token_id) + 1 if eos_token_id in ids else len(ids)
        # Special tokens stay visible: one in the middle of a text is an error, and must not be decoded away.
        prediction, target = (
            tokenizer.decode([i for i in text if i != eos_token_id]).strip() for text in (ids[:n_generated], target_ids)
        )
        answer = extract_answer(prediction)
        n_latents = item.features["n_latents"]
        predictions.append(
            Prediction(
                index=item.index,
                key=item.sample.key,
                question=item.sample.question,
                prediction=prediction,
                target=target,
                answer=item.sample.answer,
                predicted_answer=answer,
                correct=exact_match(answer, item.sample.answer),
                full_match=prediction == target,
                n_generated=n_generated,
                n_latents=n_latents,
                passes=n_latents + n_generated,
                n_prompt_tokens=lengths[row],
                n_patches=item.features["num_patches"],
                images_from=item.images_from,
            )
        )
        row += 1
    return predictions


def _failure(item: _Asked) -> Prediction:
    sample = item.sample
    return Prediction(
        index=item.index,
        key=sample.key if sample else f"#{item.index}",
        question=sample.question if sample else "",
        prediction="",
        target="",
        answer=sample.answer if sample else "",
        predicted_answer=None,
        correct=False,
        full_match=False,
        n_generated=0,
        n_latents=0,
        passes=0,
        n_prompt_tokens=0,
        n_patches=0,
        images_from=item.images_from,
        error=item.error,
    )
