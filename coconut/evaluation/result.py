"""How a model was asked, what it said to each question, and what that comes to: the values that evaluation hands on.

On disk, in a folder of its own:

    predictions.jsonl   one `Prediction` a line, in the order of the data
    summary.json        the numbers of a table's row, the options, the checkpoint; written last
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from math import fsum
from pathlib import Path
from typing import Any

from coconut.evaluation.metrics import METRICS
from coconut.evaluation.score import wilson_interval
from coconut.evaluation.stats import estimate
from coconut.types import ConfigError, DataError, StageSpec

THOUGHTS = ("own", "noise")
BY = ("generation", "likelihood")
PREDICTIONS_FILE = "predictions.jsonl"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is asked.

    Attributes:
        batch_size: questions a generate call, on each rank.
        max_new_tokens: a text that has not ended by then is cut, and scored as it is.
        limit: only the first so many samples; None takes all.
        shuffle_images: show every question the image of another sample, each image once (text-only samples stay).
        latents: thoughts of every sample, in place of those of the checkpoint's stage; None leaves these.
        metric: what makes an answer right, one of `metrics.METRICS`.
        by: "generation", or "likelihood": the choice whose text is likeliest is the answer, and nothing is generated.
        thoughts: "own", or "noise": each thought is replaced by Gaussian noise of the same norm.
        seed: of shuffling and noise.
    """

    batch_size: int = 250
    max_new_tokens: int = 64
    limit: int | None = None
    shuffle_images: bool = False
    thoughts: str = "own"
    seed: int = 0
    latents: int | None = None
    metric: str = "exact"
    by: str = "generation"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a number of at least 1")
        if self.latents is not None and self.latents < 0:
            raise ConfigError(f"latents is {self.latents}; give a number of at least 0")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give a number of at least 0")
        for name, known in (("thoughts", THOUGHTS), ("metric", tuple(METRICS)), ("by", BY)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(known)}")
        if self.by == "likelihood" and self.metric != "choice":
            raise ConfigError(f"by is 'likelihood', which is for choices; set metric to choice (it is {self.metric!r})")


@dataclass(frozen=True)
class Prediction:
    """One question, what the model said, and whether that was right. A sample that could not be read is wrong."""

    index: int
    key: str
    question: str
    prediction: str  # the generated text as it is, without the end-of-sequence token
    target: str  # the text that training asks for at this stage
    answer: str  # the truth
    predicted_answer: str | None
    correct: bool  # the score is 1
    score: float  # of the metric, 0 to 1
    full_match: bool  # the whole text is the target
    n_generated: int  # tokens, the end of sequence counted
    n_latents: int
    passes: int  # sequential forward passes: latents, the first token, then one a token
    n_prompt_tokens: int
    n_patches: int
    images_from: str | None = None  # key of the sample whose images were shown instead
    error: str | None = None  # why this sample could not be asked
    choice_nats: list[float] | None = None  # log-likelihood of each choice, where answers are chosen so


@dataclass(frozen=True)
class EvaluationResult:
    """All predictions in the order of the data, and what they come to."""

    predictions: tuple[Prediction, ...]
    spec: StageSpec
    options: EvaluationOptions
    seconds: float  # spent in generate on real batches, summed over ranks

    @property
    def n_samples(self) -> int:
        return len(self.predictions)

    @property
    def scores(self) -> list[float]:
        return [p.score for p in self.predictions]

    @property
    def accuracy(self) -> float:
        """The mean score, added in the order of the data."""
        return fsum(self.scores) / self.n_samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy: Wilson's of a share, the bootstrap's of soft scores."""
        if all(score in (0.0, 1.0) for score in self.scores):
            return wilson_interval(sum(p.correct for p in self.predictions), self.n_samples)
        found = estimate(self.scores)
        return found.low, found.high

    @property
    def full_match(self) -> float:
        return sum(p.full_match for p in self.predictions) / self.n_samples

    def mean(self, name: str) -> float:
        """Mean of a count over the samples that were asked; 0 where none was."""
        values = [getattr(p, name) for p in self.predictions if p.error is None]
        return sum(values) / len(values) if values else 0.0

    def summary(self) -> dict[str, Any]:
        """The numbers of a table's row; plain values, ready for JSON."""
        bootstrap = estimate(self.scores)
        return {
            "n_samples": self.n_samples,
            "n_correct": sum(p.correct for p in self.predictions),
            "n_failed": sum(p.error is not None for p in self.predictions),
            "accuracy": self.accuracy,
            "accuracy_interval_95": list(self.interval),
            "bootstrap_interval_95": [bootstrap.low, bootstrap.high],
            "full_match": self.full_match,
            "mean_generated_tokens": self.mean("n_generated"),
            "mean_latents": self.mean("n_latents"),
            "mean_forward_passes": self.mean("passes"),
            "seconds_per_sample": self.seconds / self.n_samples,
            "stage_spec": asdict(self.spec),
            "options": asdict(self.options),
        }

    def headline(self) -> str:
        """The result in one line that a person can read."""
        low, high = self.interval
        n_failed = sum(p.error is not None for p in self.predictions)
        failed = f", {n_failed} of them not asked or not scored" if n_failed else ""
        return (
            f"accuracy {self.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%}, {self.n_samples} samples{failed}), "
            f"{self.mean('n_generated'):.1f} tokens generated, {self.mean('passes'):.1f} sequential forward passes, "
            f"{1000 * self.seconds / self.n_samples:.1f} ms a sample"
        )

    @classmethod
    def load(cls, folder: Path) -> EvaluationResult:
        """Read what `save` wrote.

        Raises:
            DataError: it is damaged, or of another version.
        """
        try:
            summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
            lines = (folder / PREDICTIONS_FILE).read_text(encoding="utf-8").split("\n")[:-1]
            if len(lines) != summary["n_samples"]:
                raise ValueError(f"{len(lines)} lines in {PREDICTIONS_FILE}, {summary['n_samples']} in {SUMMARY_FILE}")
            predictions = tuple(Prediction(**json.loads(line)) for line in lines)
            for p in predictions:
                float(p.score)
            return cls(
                predictions,
                StageSpec(**summary["stage_spec"]),
                EvaluationOptions(**summary["options"]),
                summary["seconds_per_sample"] * summary["n_samples"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} holds no evaluation that can be read ({error!r}); evaluate again") from error

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Write predictions.jsonl and summary.json; the summary comes last and so marks a complete result.

        Args:
            folder: made if missing.
            extra: further entries of the summary (checkpoint, data).
        """
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in self.predictions]
        write_whole(folder / PREDICTIONS_FILE, "".join(lines))
        write_whole(folder / SUMMARY_FILE, json.dumps({**self.summary(), **(extra or {})}, indent=2) + "\n")


def require_folder(out: Path) -> None:
    """Refuse a folder that results cannot be written to, before they cost anything; it is not made yet.

    Raises:
        ConfigError: it is something else, or cannot be made or written to.
    """
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{out}: cannot write to {there} ({error.strerror}); choose another folder") from error


def write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
