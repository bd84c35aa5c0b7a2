"""The small typed values that travel between the layers, and the exceptions a user can meet.

Every other module of the package may import this one; it imports none of them.

    record -> Sample -> EncodedText (+ tiles) -> StagedText -> Batch -> loss
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class CoconutError(Exception):
    """Base of every error this package raises for something its user can mend."""


class ConfigError(CoconutError, ValueError):
    """A configuration file, override or ds_config is unusable; the message lists every fault."""


class DataError(CoconutError, ValueError):
    """A record, image, shard or tokenizer is unusable; the message names file, shard and key."""


class SourceError(DataError):
    """Data cannot be reached (a server, a disk); nothing is wrong with a sample, so none may be left out for it."""


class CheckpointError(CoconutError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


class TrainingError(CoconutError, RuntimeError):
    """Training cannot go on as it is configured: memory is short, or steps keep failing."""


#: The three tokens of the latent span, as spelled in the tokenizer.
START_LATENT_TOKEN = "<|start-latent|>"
LATENT_TOKEN = "<|latent|>"
END_LATENT_TOKEN = "<|end-latent|>"
SPECIAL_TOKENS = (START_LATENT_TOKEN, LATENT_TOKEN, END_LATENT_TOKEN)

#: Methods whose stages take the written steps away one after the other; the others have a single stage.
STAGED_METHODS = ("coconut", "icot", "pause_as_thought", "pause_multipass", "no_thought")

#: Label value that no loss is computed for (the convention of torch and transformers).
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Sample:
    """One reasoning problem as written by a person: the only form in which data enters the trainer."""

    key: str  # unique in its data set
    question: str
    steps: tuple[str, ...]  # written reasoning, one entry a step; may be empty
    answer: str
    images: tuple[bytes | str, ...] = ()  # encoded image files (bytes), or paths to them
    choices: tuple[str, ...] = ()
    source: str = ""  # "file.json:17" or "shard-000003.tar", for error messages
    references: tuple[str, ...] = ()  # answers of several people, for the soft scores of VQA and A-OKVQA


@dataclass(frozen=True)
class PromptTemplate:
    """Token ids that surround images and question; built once from a tokenizer, saved with every checkpoint.

    A prompt is ``prefix + images + question + suffix (+ start latents end)``, where each image is
    ``image_open + [image_context] * n + image_close``. Text-only models leave the image ids empty.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    image_open: tuple[int, ...] = ()
    image_context: int | None = None
    image_close: tuple[int, ...] = ()

    def prompt(self, question: list[int], image_tokens: list[int]) -> list[int]:
        """Ids of a whole prompt without its latent span.

        Args:
            question: ids of the question, without special tokens.
            image_tokens: number of image tokens of each image, in order.
        """
        ids = list(self.prefix)
        for n_tokens in image_tokens:
            if self.image_context is None:
                raise DataError("this tokenizer has no image token, but the sample has an image")
            ids += [*self.image_open, *([self.image_context] * n_tokens), *self.image_close]
        return [*ids, *question, *self.suffix]

    def to_dict(self) -> dict[str, Any]:
        return {
            "prefix": list(self.prefix),
            "suffix": list(self.suffix),
            "image_open": list(self.image_open),
            "image_context": self.image_context,
            "image_close": list(self.image_close),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptTemplate:
        return cls(
            prefix=tuple(values["prefix"]),
            suffix=tuple(values["suffix"]),
            image_open=tuple(values["image_open"]),
            image_context=values["image_context"],
            image_close=tuple(values["image_close"]),
        )


@dataclass(frozen=True)
class EncodedText:
    """A sample's text as token ids, before any stage is applied."""

    key: str
    prompt: tuple[int, ...]  # images, question and template; ends where reasoning begins
    steps: tuple[tuple[int, ...], ...]  # ids of each written step, its line break included
    answer: tuple[int, ...]  # "### answer" and the end-of-sequence id


@dataclass(frozen=True)
class StagedText:
    """One sample at one stage: what the model reads and what it is asked to say."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]  # same length; IGNORE_INDEX on the prompt and the latent span
    prompt_length: int  # ids before the first label: prompt and latent span
    n_latents: int


@dataclass(frozen=True)
class StageSpec:
    """What one curriculum stage does to a sample's text (arXiv 2412.06769, section 3)."""

    stage: int
    n_skip_steps: int | None  # leading written steps that are removed; None removes all
    n_latents: int  # thoughts of a sample that has enough steps
    c_thought: int  # thoughts a removed step
    pad_latent_to_max: bool = False  # shorter samples get n_latents too
    markers: bool = True  # whether the span is marked by start and end tokens
    n_skip_tokens: int = 0  # leading tokens of the written steps that are removed (icot)
    method: str = ""  # as in the configuration


@dataclass
class Batch:
    """One micro-batch: tensors for the model's forward, and who they are."""

    tensors: dict[str, Any]  # keyword arguments of MultimodalCoconut.forward
    keys: tuple[str, ...]  # sample keys, one a row; empty for an inert micro-batch
    n_label_tokens: int  # label tokens that the loss sums over
    n_tokens: int = 0  # tokens that are not padding
    extras: dict[str, Any] = field(default_factory=dict)
