"""Ask a model every question of a data set, greedily, and score what it says.

    indices --batch b, fixed by index--> rank b % W --> prompts --generate, once--> texts --score--> gathered by index
                                                              --or: likelihood of each choice-->

Which samples share a batch depends on the batch size alone, so any number of ranks gives the same numbers. All ranks
make the same number of generate calls, with inert batches where one has less to do: under ZeRO-3 a rank that called
less often would stop the others for ever.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Any

from torch import Tensor

from coconut.evaluation.interventions import SampleSource, image_donors, noise_like_thoughts
from coconut.evaluation.loaded import require_fit
from coconut.evaluation.metrics import right_choice, score
from coconut.evaluation.progress import DoneBatch, Progress
from coconut.evaluation.result import EvaluationOptions, EvaluationResult, Prediction
from coconut.evaluation.score import ANSWER_MARK, extract_answer
from coconut.types import Batch, ConfigError, DataError, Sample, StageSpec
from coconut.utils.distributed import all_gather_object, get_rank, get_world_size, is_main_process
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
    progress: Progress | None = None,
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
        progress: where finished batches are kept, so that an evaluation that was killed goes on; None keeps none.

    Raises:
        ConfigError: choices by likelihood were asked for in an engine that partitions its weights.
        DataError: there is nothing to evaluate, or not one sample can be read.
    """
    options = options or EvaluationOptions()
    if options.by == "likelihood" and model.lockstep:
        raise ConfigError("by is 'likelihood', which needs whole weights on every rank; evaluate the saved checkpoint")
    if options.latents is not None:
        # Samples of fewer steps than that get the number too: the question is what so many thoughts are good for.
        spec = dataclasses.replace(spec, n_latents=options.latents, pad_latent_to_max=True)
    n_samples = min(len(source), options.limit or len(source))
    if n_samples == 0:
        raise DataError("the data set to evaluate on is empty")
    donors = image_donors(source, n_samples, options.seed) if options.shuffle_images else None
    size = options.batch_size
    batches = [range(first, min(first + size, n_samples)) for first in range(0, n_samples, size)]
    done = progress.open() if progress is not None else {}
    todo = [number for number in range(len(batches)) if number not in done]
    rank, world = get_rank(), get_world_size()
    mine: dict[int, DoneBatch] = {}
    said_at = time.monotonic()
    for first in range(0, len(todo), world):
        number = todo[first + rank] if first + rank < len(todo) else None
        indices = range(0) if number is None else batches[number]
        asked = _prepare(indices, source, encoder, spec, model, donors, options)
        features = [item.features for item in asked if item.features is not None]
        started = time.perf_counter()
        if options.by == "likelihood":
            found = _choose(model, asked, encoder, collator, tokenizer, options)
            seconds = time.perf_counter() - started
        else:
            batch = collator.collate_prompts(features)
            texts_ids = _generate(model, batch, options)
            seconds = time.perf_counter() - started
            found = _score(asked, texts_ids, batch, tokenizer, model, options.metric)
        if number is not None:
            mine[number] = (found, seconds)
            if progress is not None:
                progress.add(number, *mine[number])
        if is_main_process() and time.monotonic() - said_at > _SECONDS_BETWEEN_LINES:
            said_at = time.monotonic()
            n_done = min((len(done) + first + world) * size, n_samples)
            logger.info("evaluated %d of %d samples", n_done, n_samples)
    for part in all_gather_object(mine):
        done |= part
    predictions = [p for number in range(len(batches)) for p in done[number][0]]
    assert [p.index for p in predictions] == list(range(n_samples)), "a sample was asked twice or never"
    failed = [p for p in predictions if p.error is not None]
    if len(failed) == n_samples:
        raise DataError(f"none of {n_samples} samples could be read; the first: {failed[0].error}")
    if failed and is_main_process():
        count = f"{len(failed)} of {n_samples}"
        logger.warning("%s samples could not be read and count as wrong; the first: %s", count, failed[0].error)
    seconds = fsum(done[number][1] for number in range(len(batches)))
    return EvaluationResult(tuple(predictions), spec, options, seconds)


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
    model: MultimodalCoconut,
    donors: dict[int, int] | None,
    options: EvaluationOptions,
) -> list[_Asked]:
    n_new = options.max_new_tokens if options.by == "generation" else 0
    asked = []
    for index in indices:
        sample, images_from = None, None
        try:
            sample = source.read(index)
            score(options.metric, None, sample)  # a sample that cannot be judged is not asked
            if donors is not None and index in donors:
                donor = source.read(donors[index])
                sample, images_from = dataclasses.replace(sample, images=donor.images), donor.key
            features = encoder.with_stage(encoder.encode(sample), spec, model.latent_ids)
            require_fit(model, sample.key, features["prompt_length"] + n_new)
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
    asked: list[_Asked], texts_ids: list[list[int]], batch: Batch, tokenizer: Any, model: MultimodalCoconut, metric: str
) -> list[Prediction]:
    predictions = []
    row = 0  # of the batch; samples that could not be read have none
    lengths = batch.tensors["attention_mask"].sum(1).tolist()
    eos_token_id = model.eos_token_id
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
        points = score(metric, answer, item.sample)
        predictions.append(
            Prediction(
                index=item.index,
                key=item.sample.key,
                question=item.sample.question,
                prediction=prediction,
                target=target,
                answer=item.sample.answer,
                predicted_answer=answer,
                correct=points == 1.0,
                score=points,
                full_match=prediction == target,
                n_generated=n_generated,
                n_latents=n_latents,
                passes=model.calls_of_thoughts(n_latents) + n_generated,
                n_prompt_tokens=lengths[row],
                n_patches=item.features["num_patches"],
                images_from=item.images_from,
            )
        )
        row += 1
    return predictions


def _choose(
    model: MultimodalCoconut,
    asked: list[_Asked],
    encoder: SampleEncoder,
    collator: MultimodalCollator,
    tokenizer: Any,
    options: EvaluationOptions,
) -> list[Prediction]:
    """Answer with the likeliest choice: the sum over its tokens, end of sequence counted, right after the thoughts."""
    from coconut.evaluation.thoughts import collate_questions, likelihood, think

    items = [(item.features, item.sample) for item in asked if item.features is not None and item.sample is not None]
    if not items:
        return [_failure(item) for item in asked]
    features = [feature for feature, _ in items]
    prompts = collate_questions(features, range(len(items)), collator, model.latent_token_id)
    transform = None
    if options.thoughts == "noise":
        ids = prompts.tensors["input_ids"]
        transform = noise_like_thoughts(ids, model.latent_token_id, prompts.keys, options.seed)
    memory = think(model, prompts, transform)
    spoken = [
        [encoder.encode_text(dataclasses.replace(s, answer=text), f["patches_per_image"]).answer for text in s.choices]
        for f, s in items
    ]
    nats: list[list[float]] = [[] for _ in items]
    for number in range(max(map(len, spoken))):
        # A row with fewer choices reads its first again, and forgets it.
        targets = tuple(texts[number] if number < len(texts) else texts[0] for texts in spoken)
        lengths = tuple(map(len, targets))
        values = likelihood(model, memory, dataclasses.replace(prompts, targets=targets, answer_lengths=lengths))
        for row, value in enumerate(values):
            if number < len(spoken[row]):
                nats[row].append(value)
    predictions, row = [], 0
    for item in asked:
        if item.features is None or item.sample is None:
            predictions.append(_failure(item))
            continue
        best = max(range(len(nats[row])), key=nats[row].__getitem__)
        target = tokenizer.decode(list(prompts.targets[row])[:-1]).strip()
        points = float(best == right_choice(item.sample))
        predictions.append(
            Prediction(
                index=item.index,
                key=item.sample.key,
                question=item.sample.question,
                prediction=f"{ANSWER_MARK} {item.sample.choices[best]}",
                target=target,
                answer=item.sample.answer,
                predicted_answer=item.sample.choices[best],
                correct=points == 1.0,
                score=points,
                full_match=points == 1.0,
                n_generated=0,
                n_latents=item.features["n_latents"],
                passes=model.calls_of_thoughts(item.features["n_latents"]) + 1,
                n_prompt_tokens=prompts.prompt_lengths[row],
                n_patches=item.features["num_patches"],
                images_from=item.images_from,
                choice_nats=nats[row],
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
        score=0.0,
        full_match=False,
        n_generated=0,
        n_latents=0,
        passes=0,
        n_prompt_tokens=0,
        n_patches=0,
        images_from=item.images_from,
        error=item.error,
    )
