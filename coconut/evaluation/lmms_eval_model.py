"""A checkpoint as a model of lmms-eval, so that its public benchmarks run with latent thoughts.

    python -m lmms_eval --model coconut --model_args pretrained=RUN --tasks TASKS --batch_size 16

    request: context + pictures --prompt as in training, thoughts--> generate   --> text, or the answer in it
                                                                 --> likelihood --> nats of a continuation

Registered in pyproject.toml (`lmms_eval_plugin.manifest`).
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image

from coconut.evaluation.ask import Settings, ask, prompt_features
from coconut.evaluation.loaded import load
from coconut.evaluation.run import find_checkpoint, require_stage
from coconut.evaluation.thoughts import collate_questions, likelihood_and_greedy, think
from coconut.types import ConfigError, Sample

#: Settings of a task's generation that change nothing here.
_WITHOUT_EFFECT = {"until", "max_new_tokens", "temperature", "do_sample", "use_cache", "num_return_sequences"}
#: Settings that stand for "off" with these values, as tasks often write them.
_OFF = {"num_beams": (None, 1), "top_p": (None, 0, 1), "top_k": (None,)}


class CoconutLmms(lmms):
    """Answers lmms-eval's requests with a checkpoint of the trainer or an exported folder.

    Args:
        pretrained: the folder; of a run, its final one.
        latents: thoughts before an answer; None takes the checkpoint's own number.
        batch_size: requests at once.
        device: such as cuda:1; None is this rank's.
        whole_text: return all that was written, not the answer behind ###; and score a continuation as it stands, not
            as the answer that the model was taught to write (### before it, end of sequence behind).

    Raises:
        CheckpointError: no checkpoint there.
        ConfigError: an argument is unusable.
    """

    is_simple = True  # requests hold a text and pictures, not a conversation

    def __init__(
        self,
        pretrained: str,
        latents: int | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        whole_text: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if max_batch_size is not None or not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(
                f"batch_size is {batch_size} and max_batch_size {max_batch_size}; give --batch_size a number of at "
                "least 1, and no --max_batch_size: it is not found out here"
            )
        checkpoint = find_checkpoint(Path(pretrained))
        markers = require_stage(checkpoint)["markers"]
        if latents is not None and (latents < 0 or (latents and not markers)):
            raise ConfigError(f"latents is {latents}; give 0 or more, and 0 to a checkpoint trained without thoughts")
        self.loaded = load(checkpoint)
        if device is not None:
            self.loaded.model.to(device)
        self.batch_size = int(batch_size)
        self.n_latents = self.loaded.spec.n_latents if latents is None else latents
        self.whole_text = bool(whole_text)

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers what several ranks found."""
        return self.loaded.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """A text for each request (context, settings, pictures ...), cut before the first of its `until`.

        Raises:
            ConfigError: a task asks for beams or a filter of sampling.
        """
        found: dict[int, GenerationResult] = {}
        for rows in _batches(requests, self.batch_size, key=lambda request: repr(request.args[1])):
            settings = self._settings(requests[rows[0]].args[1])
            samples = [self._sample(requests[row], requests[row].args[2:]) for row in rows]
            for row, reply in zip(rows, ask(self.loaded, samples, settings), strict=True):
                text = reply.text if self.whole_text else reply.answer or reply.text
                text = _cut(text, requests[row].args[1].get("until") or ())
                found[row] = GenerationResult(text, TokenCounts(output_tokens=reply.n_generated))
        return [found[row] for row in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """How likely each continuation is after the thoughts, in nats, and whether greedy decoding writes it.

        What is returned is what the tasks of lmms-eval 0.7 read, not what its interface says. A task of choices takes
        the least value, a loss, since that is what the package's own models return; a task of type loglikelihood takes
        the log-likelihood. And the pair stands in the text of a result: the evaluator makes a string of a bare one.
        """
        found: dict[int, GenerationResult] = {}
        model = self.loaded.model
        for rows in _batches(requests, self.batch_size):
            samples = [self._sample(requests[row], requests[row].args[2:]) for row in rows]
            features = [prompt_features(self.loaded, sample, self.n_latents) for sample in samples]
            prompts = collate_questions(features, range(len(rows)), self.loaded.collator, model.latent_token_id)
            targets = tuple(self._target(requests[row], feature) for row, feature in zip(rows, features, strict=True))
            prompts = dataclasses.replace(prompts, targets=targets, answer_lengths=tuple(map(len, targets)))
            values = likelihood_and_greedy(model, think(model, prompts), prompts)
            for row, (nats, greedy) in zip(rows, values, strict=True):
                is_choice = not callable(requests[row].args[1])
                found[row] = GenerationResult((-nats if is_choice else nats, greedy))
        return [found[row] for row in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not possible: the model was taught to answer one question.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("tasks of several rounds cannot be run: a checkpoint is taught to answer one question")

    def _settings(self, wanted: dict[str, Any]) -> Settings:
        off = {name for name, values in _OFF.items() if name in wanted and wanted[name] in values}
        if unknown := {name: wanted[name] for name in wanted if name not in _WITHOUT_EFFECT | off}:
            raise ConfigError(
                f"the task's generation_kwargs hold {unknown}, which this model does not do: it decodes greedily, or "
                "samples at a temperature; override them with --gen_kwargs"
            )
        sampled = wanted.get("do_sample", True) and wanted.get("temperature")
        limit = wanted.get("max_new_tokens") or Settings.max_new_tokens
        return Settings(limit, self.n_latents, float(wanted["temperature"]) if sampled else 0.0)

    def _sample(self, request: Instance, rest: Sequence[Any]) -> Sample:
        """The question of a request: its context and the pictures that its task finds for its document."""
        pictures: Sequence[Any] = ()
        if rest:  # a request for a choice's likelihood without any context has neither pictures nor document
            doc_to_visual, doc_id, task, split = rest[:4]
            pictures = doc_to_visual(self.task_dict[task][split][doc_id]) or ()
        key = f"{request.task_name} {request.doc_id}"
        images = tuple(_encoded(picture, key) for picture in pictures)
        return Sample(key=key, question=request.args[0], steps=(), answer="", images=images, source=key)

    def _target(self, request: Instance, feature: dict[str, Any]) -> tuple[int, ...]:
        """Token ids of a continuation."""
        text = request.args[1]
        if callable(text):  # a task of type loglikelihood hands over how to find it
            _, doc_id, task, split = request.args[2:6]
            text = text(self.task_dict[task][split][doc_id])
        if self.whole_text:
            return tuple(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
        answered = dataclasses.replace(feature["sample"], answer=text.strip())
        return tuple(self.loaded.encoder.encode_text(answered, feature["patches_per_image"]).answer)


def _batches(requests: Sequence[Instance], size: int, key: Any = None) -> Iterator[list[int]]:
    """Numbers of requests that go together: in order, and only those with the same key."""
    groups: dict[Any, list[int]] = {}
    for row, request in enumerate(requests):
        groups.setdefault(key(request) if key else None, []).append(row)
    for rows in groups.values():
        yield from (rows[first : first + size] for first in range(0, len(rows), size))


def _cut(text: str, until: str | Sequence[str]) -> str:
    """The text before the first of some strings."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text


def _encoded(picture: Any, key: str) -> bytes:
    if not isinstance(picture, Image.Image):
        kind = type(picture).__name__
        raise ConfigError(f"{key} shows a {kind}: this model takes pictures only, no video and no sound")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16") else "TIFF")
    return buffer.getvalue()
