"""Questions that have no known answer, put to a checkpoint: one by one, streamed or not, or many at once.

question + images --prompt as in training, with the stage's thoughts--> generate --> text, answer
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coconut.data.sample import read_records, sample_from_record
from coconut.evaluation.loaded import Loaded, require_fit
from coconut.evaluation.score import extract_answer
from coconut.types import ConfigError, DataError, Sample


@dataclass(frozen=True)
class Settings:
    """How an answer is generated.

    Attributes:
        max_new_tokens: a text is cut there.
        n_latents: thoughts before the answer; None takes the checkpoint's own number.
        temperature: of sampling; 0 is greedy.
    """

    max_new_tokens: int = 100
    n_latents: int | None = None
    temperature: float = 0.0

    def to_generate(self) -> dict[str, Any]:
        """Keyword arguments of transformers' generation."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {"do_sample": True, "temperature": self.temperature, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and the answer in it (None where it gave none)."""

    text: str
    answer: str | None
    n_generated: int
    n_latents: int


def ask(loaded: Loaded, samples: Sequence[Sample], settings: Settings, streamer: Any = None) -> list[Reply]:
    """Answer the questions of some samples in one batch; their steps and answers are not looked at.

    Args:
        loaded: a checkpoint.
        samples: questions with their images.
        settings: how to generate.
        streamer: a transformers streamer, for a single question.

    Raises:
        DataError: an image cannot be read, the model takes none, or the text would be longer than it reads.
        ConfigError: thoughts of a model that was trained without.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    n_latents = loaded.spec.n_latents if settings.n_latents is None else settings.n_latents
    features = [prompt_features(loaded, sample, n_latents, settings.max_new_tokens) for sample in samples]
    batch = loaded.collator.collate_prompts(features)
    tensors = {name: value.to(model.device) for name, value in batch.tensors.items() if isinstance(value, Tensor)}
    ids_BT = model.generate(
        pixel_values=tensors.get("pixel_values"),
        input_ids=tensors["input_ids"],
        attention_mask=tensors["attention_mask"],
        num_patches=tensors["num_patches"],
        wrap_prompt=False,
        **({} if streamer is None else {"streamer": streamer}),
        **settings.to_generate(),
    )
    replies = []
    for ids in ids_BT.tolist():
        ended = model.eos_token_id in ids
        written = ids[: ids.index(model.eos_token_id)] if ended else ids
        text = tokenizer.decode(written).strip()
        replies.append(Reply(text, extract_answer(text), len(written) + ended, n_latents))
    return replies


def prompt_features(loaded: Loaded, sample: Sample, n_latents: int, n_new: int = 0) -> dict[str, Any]:
    """As `SampleEncoder` makes them, but with a number of thoughts that does not come from written steps.

    `n_new` tokens have to fit behind them.
    """
    if n_latents and not loaded.spec.markers:
        raise ConfigError(f"{n_latents} latents: this checkpoint was trained without thoughts ({loaded.spec.method})")
    features = loaded.encoder.encode(sample)
    ids = list(features["text"].prompt)
    if n_latents or loaded.spec.markers:
        start, latent, end = loaded.model.latent_ids
        ids += [start, *([latent] * n_latents), end]
    require_fit(loaded.model, sample.source or sample.key, len(ids) + n_new)
    return {
        **features,
        "input_ids": torch.tensor(ids),
        "labels": torch.full((len(ids),), -100),
        "prompt_length": len(ids),
        "n_latents": n_latents,
    }


def question(text: str, images: Sequence[str], key: str = "question") -> Sample:
    """A sample of a question alone.

    Raises:
        DataError: the question is empty.
    """
    if not text.strip():
        raise DataError("the question is empty")
    return Sample(key=key, question=text, steps=(), answer="", images=tuple(images), source=key)


def answer_file(
    loaded: Loaded, path: Path, out: Path, settings: Settings, batch_size: int, image_root: Path | None = None
) -> tuple[int, int]:
    """Answer every record of a JSON or JSONL file; one line each is written as soon as its batch is done.

    Records need a question; image and id are used where there are any, and other fields come along unchanged. A record
    that cannot be asked gets a line with "error" in place of an answer.

    Returns:
        numbers of records answered and failed.
    """
    root = image_root if image_root is not None else path.parent
    n_answered = n_failed = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for chunk in _chunks(read_records(path), batch_size):
            lines = _answer_chunk(loaded, chunk, path, root, settings)
            n_failed += sum("error" in line for line in lines)
            n_answered += sum("error" not in line for line in lines)
            file.writelines(_line(line) + "\n" for line in lines)
            file.flush()
    return n_answered, n_failed


def _line(record: dict[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    is_broken = any("\ud800" <= character <= "\udfff" for character in text)
    return json.dumps(record) if is_broken else text  # JSON can say half a surrogate pair, UTF-8 cannot


def _chunks(records: Iterator[tuple[int, Any]], size: int) -> Iterator[list[tuple[int, Any]]]:
    chunk: list[tuple[int, Any]] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _answer_chunk(
    loaded: Loaded, chunk: Sequence[tuple[int, Any]], path: Path, root: Path, settings: Settings
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    asked: list[tuple[int, Sample]] = []
    for number, record in chunk:
        line = dict(record) if isinstance(record, dict) else {"record": record}
        line.pop("error", None)  # of an earlier answering: this one says its own
        lines.append(line)
        # Steps and answer are what training needs; a question that is only asked may come without, or with anything.
        whole = {**record, "steps": [], "answer": ""} if isinstance(record, dict) else record
        try:
            sample = sample_from_record(whole, key=str(number), source=f"{path}:{number}", image_root=root)
            n_latents = loaded.spec.n_latents if settings.n_latents is None else settings.n_latents
            prompt_features(loaded, sample, n_latents, settings.max_new_tokens)  # a faulty one must not cost its batch
            asked.append((len(lines) - 1, sample))
        except DataError as error:
            line["error"] = str(error)
    if asked:
        for (place, _), reply in zip(asked, ask(loaded, [s for _, s in asked], settings), strict=True):
            lines[place] |= {"prediction": reply.text, "predicted_answer": reply.answer}
    return lines
