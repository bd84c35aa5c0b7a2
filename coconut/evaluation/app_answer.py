"""A question from a person, answered so that a page can show it: words as they come, then what each thought held.

    picture + question --check--> features --generate, token by token--> text so far ...
                                           --read once more--> lens and attention of each thought

Shapes: K thoughts, H hidden size.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from coconut.data.image import MAX_PIXELS, open_image
from coconut.evaluation.ask import Reply, Settings, ask, prompt_features, question
from coconut.evaluation.loaded import Loaded
from coconut.evaluation.probe_look import Look, Seen, look, paint, shows_whole_picture
from coconut.evaluation.probe_words import lens
from coconut.evaluation.score import ANSWER_MARK, extract_answer
from coconut.types import CoconutError, DataError

logger = logging.getLogger(__name__)

MAX_QUESTION_CHARS = 4_000
MAX_PICTURE_MB = 20
#: All attention weights of a prompt are held at once while they are looked at.
MAX_ATTENTION_BYTES = 2 * 2**30
_SIDE_PX = 320  # of a drawn picture


@dataclass(frozen=True)
class ThoughtView:
    """What is shown of one thought, or of the answer's first word."""

    label: str
    tokens: tuple[tuple[str, float], ...]  # likeliest words with their probabilities; none for the answer
    picture: bytes | None  # PNG, bright where the model looked
    share: float | None  # of all its attention, what went to the picture


@dataclass(frozen=True)
class Answered:
    """An answer so far; `views` and `note` come with the last one, `done`."""

    text: str
    answer: str | None
    n_latents: int
    n_generated: int
    passes: int  # sequential calls of the decoder: one a thought and one a written token
    seconds: float
    views: tuple[ThoughtView, ...] = ()
    note: str = ""  # why no attention is drawn, where none is
    done: bool = False


class Answerer:
    """Answers one question at a time; others wait their turn.

    Args:
        loaded: a checkpoint.
        max_new_tokens: a text is cut there.
    """

    def __init__(self, loaded: Loaded, max_new_tokens: int = 100) -> None:
        self.loaded = loaded
        self.max_new_tokens = max_new_tokens
        # A single worker: the model's attention is switched while it is looked at, which no other question may meet.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answer")

    @property
    def max_latents(self) -> int:
        """Most thoughts that may be asked for: those of the checkpoint's stage."""
        return self.loaded.spec.n_latents if self.loaded.spec.markers else 0

    @property
    def takes_pictures(self) -> bool:
        return self.loaded.processor is not None

    def stream(self, picture: bytes | None, text: str, n_latents: int) -> Iterator[Answered]:
        """The answer as it grows, a value for each token, and last the whole with its thoughts.

        Args:
            picture: an encoded image; None for a model of text.
            text: the question.
            n_latents: thoughts before the answer.

        Raises:
            DataError: there is no question or no picture, one is too large, or the picture cannot be read.
        """
        self._check(picture, text, n_latents)
        sample = question(text, ())
        if picture is not None and self.takes_pictures:
            open_image(picture)  # its message says "image", not in which record and where
            sample = replace(sample, images=(picture,))
        features = prompt_features(self.loaded, sample, n_latents, self.max_new_tokens)
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        calls = model.calls_of_thoughts(n_latents)
        started = time.perf_counter()

        def so_far(text: str, n_generated: int) -> Answered:
            seconds = time.perf_counter() - started
            return Answered(text, extract_answer(text), n_latents, n_generated, calls + n_generated, seconds)

        tokens = _Tokens()
        settings = Settings(self.max_new_tokens, n_latents)
        asked: Future[list[Reply]] = self._worker.submit(ask, self.loaded, [sample], settings, tokens)
        asked.add_done_callback(lambda _: tokens.queue.put(None))
        try:
            ids: list[int] = []
            while (token := tokens.queue.get()) is not None:
                ids.append(token)
                written = [i for i in ids if i != model.eos_token_id]
                yield so_far(tokenizer.decode(written).strip(), len(ids))
            (reply,) = asked.result()
        finally:
            tokens.stopped.set()  # whoever asked may have left
        whole = so_far(reply.text, reply.n_generated)
        views, note = self._worker.submit(self._look_inside, features, n_latents, picture, ids).result()
        yield replace(whole, views=views, note=note, done=True)

    def _check(self, picture: bytes | None, text: str, n_latents: int) -> None:
        if not text.strip():
            raise DataError("The question is empty: type one.")
        if len(text) > MAX_QUESTION_CHARS:
            raise DataError(f"The question has {len(text):,} characters; at most {MAX_QUESTION_CHARS:,} are read.")
        if self.takes_pictures and picture is None:
            raise DataError("There is no picture: choose one, or drop one on its field.")
        if picture is not None and len(picture) > MAX_PICTURE_MB * 1_000_000:
            raise DataError(f"The picture has {len(picture) / 1e6:.1f} MB; at most {MAX_PICTURE_MB} are read.")
        if not 0 <= n_latents <= self.max_latents:
            raise DataError(f"{n_latents} thoughts were asked for; this checkpoint takes 0 to {self.max_latents}.")

    def _look_inside(
        self, features: dict[str, Any], n_latents: int, picture: bytes | None, written: list[int]
    ) -> tuple[tuple[ThoughtView, ...], str]:
        length = len(features["input_ids"])
        # The answer's first word is computed where the mark before it ends.
        said = self._up_to_answer(written)
        features = {**features, "input_ids": torch.cat([features["input_ids"], torch.tensor(said, dtype=torch.long)])}
        last = "answer" if said else "first word"
        note = "" if picture is None else self._undrawable(features)
        draw = picture is not None and not note
        # Of the span <start> <latent> * K <end> at the prompt's end, a thought is computed one column before its own.
        queries = {f"thought {t + 1}": length - 2 - n_latents + t for t in range(n_latents)}
        seen = look(self.loaded, features, {**queries, last: length + len(said) - 1}, draw=draw)
        opened = open_image(picture) if draw and picture is not None else None
        looks = {one.label: one for one in seen.looks}
        views = [self._view(label, seen, number, looks.get(label), opened) for number, label in enumerate(queries)]
        if last in looks:
            views.append(self._view(last, seen, None, looks[last], opened))
        return tuple(views), note

    def _up_to_answer(self, written: list[int]) -> list[int]:
        """What was written up to the mark before the answer; nothing where there is no mark."""
        mark = self.loaded.tokenizer(ANSWER_MARK, add_special_tokens=False)["input_ids"]
        ends = [end for end in range(len(mark), len(written) + 1) if written[end - len(mark) : end] == mark]
        return written[: ends[-1]] if ends else []

    def _view(self, label: str, seen: Seen, number: int | None, drawn: Look | None, picture: Any) -> ThoughtView:
        words: list[dict[str, Any]] = []
        # Pauses, which some methods train for comparison, are no thoughts: there is nothing to be read from them.
        if number is not None and number < len(seen.thoughts_KH):
            (words,) = lens(self.loaded, seen.thoughts_KH[number : number + 1])
        return ThoughtView(
            label=label,
            tokens=tuple((word["token"], word["share"]) for word in words),
            picture=None if drawn is None else paint(picture, drawn.weights_yx, _SIDE_PX),
            share=None if drawn is None else drawn.share,
        )

    def _undrawable(self, features: dict[str, Any]) -> str:
        """Why attention cannot be drawn on the picture; empty where it can."""
        if not shows_whole_picture(self.loaded, features):
            return "Attention is not drawn: this model sees the picture in tiles, and no tile shows all of it."
        config = self.loaded.model.backbone.text_config
        length = len(features["input_ids"])
        if config.num_hidden_layers * config.num_attention_heads * length**2 * 4 > MAX_ATTENTION_BYTES:
            return f"Attention is not drawn: a prompt of {length:,} tokens has too many weights to keep them all."
        return ""


class _Left(Exception):
    """Nobody waits for the rest of an answer."""


class _Tokens(BaseStreamer):
    """Takes tokens from transformers' generation as they come, and stops it when nobody reads them any more."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self.stopped.is_set():
            raise _Left
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.queue.put(token)

    def end(self) -> None:
        pass  # the future says so


def message_of(error: Exception) -> str:
    """What a person is told of an error: its own words where they can mend it, else no more than that it happened."""
    if isinstance(error, CoconutError):
        text = str(error)
        if str(MAX_PIXELS) in text:
            text += "; make it smaller"
        return text[:1].upper() + text[1:]
    logger.error("a question failed", exc_info=error)
    if "out of memory" in str(error).lower():
        return "Memory is short: try a smaller picture, a shorter question or fewer thoughts."
    return f"The model failed ({type(error).__name__}); the log where the app was started says more."
