"""Are the latents used? One model, the same questions, asked again and again with something about the thoughts changed.

    samples --Study--> own thoughts --Condition: other thoughts | cut | other image--> answers, likelihoods
                                                                           --effects--> a causal table

Everything is paired: a condition is compared with the model's own thoughts on the same questions.

Shapes: N samples, B rows, K latent columns, T thoughts of a row, H hidden size.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coconut.evaluation.interventions import (
    SampleSource,
    donors_within,
    given_thoughts,
    noise_like_thoughts,
    only_thoughts,
    other_order,
)
from coconut.evaluation.loaded import Loaded
from coconut.evaluation.score import exact_match, extract_answer, wilson_interval
from coconut.evaluation.stats import estimate
from coconut.evaluation.thoughts import (
    Edit,
    MakeTransform,
    Memory,
    Prompts,
    answer,
    collate_questions,
    likelihood,
    think,
    thoughts_of_rows,
)
from coconut.types import DataError, Sample

logger = logging.getLogger(__name__)

MAX_THOUGHTS_ALONE = 12  # thoughts that are changed one at a time


@dataclass(frozen=True)
class Condition:
    """One way of asking: what is changed, and in which part of the table it stands.

    Attributes:
        name: for files.
        label: for people.
        group: "thoughts", "image", or "alone" for a single thought.
        transform: makes a batch's replacement of thoughts; None leaves them.
        edit: changes what is remembered before it is answered.
        donors: sample whose image is shown from the beginning, by sample.
        covered: samples that the change reaches; None is all.
        thought: the number of the only thought that is changed.
    """

    name: str
    label: str
    group: str = "thoughts"
    transform: MakeTransform | None = None
    edit: Edit | None = None
    donors: Sequence[int | None] | None = None
    covered: tuple[bool, ...] | None = None
    thought: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a condition came to, sample by sample."""

    answers: tuple[str | None, ...]
    correct: tuple[bool, ...]
    nats: tuple[float, ...]  # log-likelihood of the true answer
    tokens: tuple[int, ...]  # generated, the end of sequence counted


class Study:
    """A model and the questions it is asked, encoded once and asked in many ways.

    Args:
        loaded: a checkpoint whose stage has thoughts.
        source: samples by index.
        limit: the first so many samples are taken; None takes all.
        batch_size: questions at once.
        max_new_tokens: a text is cut there.
        seed: of every random choice.

    Attributes:
        samples: those that are studied, without their image bytes.
        thoughts: each sample's own thoughts [T, H], float32.
        unreadable: samples that could not be asked, with the reason; they are named, and not studied.

    Raises:
        DataError: no sample has a thought, or none can be read.
    """

    def __init__(
        self,
        loaded: Loaded,
        source: SampleSource,
        *,
        limit: int | None,
        batch_size: int,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.loaded, self.seed = loaded.model, loaded.tokenizer, loaded, seed
        self.source = source
        self.max_new_tokens = max_new_tokens
        self.indices: list[int] = []
        self.unreadable: list[str] = []
        features = []
        for index in range(min(len(source), limit or len(source))):
            try:
                encoded = self._encode(source.read(index))
            except DataError as error:
                self.unreadable.append(str(error))
                continue
            if encoded["n_latents"]:
                self.indices.append(index)
                features.append(encoded)
        if not features:
            reason = self.unreadable[0] if self.unreadable else "no sample gets a thought at this checkpoint's stage"
            raise DataError(f"there is nothing to probe: {reason}")
        self.features = features
        size = batch_size
        self.batches = [self._collate(range(i, min(i + size, len(features)))) for i in range(0, len(features), size)]
        self.samples = [feature["sample"] for feature in features]
        self.n_thoughts = max(feature["n_latents"] for feature in features)
        self.thoughts: list[Tensor] = [row for b in self.batches for row in thoughts_of_rows(think(self.model, b), b)]

    def __len__(self) -> int:
        return len(self.samples)

    def _encode(self, sample: Sample) -> dict[str, Any]:
        return self.loaded.encoder.with_stage(
            self.loaded.encoder.encode(sample), self.loaded.spec, self.model.latent_ids
        )

    def _collate(self, rows: Sequence[int]) -> Prompts:
        chosen = [self.features[row] for row in rows]
        return collate_questions(chosen, rows, self.loaded.collator, self.model.latent_token_id)

    def with_images_of(self, batch: Prompts, donors: Sequence[int | None]) -> Prompts:
        """The same questions over the pictures of other samples with as many tiles."""
        pixels = [self.features[_donor(donors, row)]["pixel_values"] for row in batch.rows]
        shown = [tile for tile in pixels if tile is not None]
        tensors = {**batch.tensors, "pixel_values": torch.cat(shown)} if shown else batch.tensors
        return dataclasses.replace(batch, tensors=tensors)

    def run(self, condition: Condition) -> Outcome:
        """Ask every question under a condition."""
        answers: list[str | None] = []
        nats: list[float] = []
        tokens: list[int] = []
        for batch in self.batches:
            asked = batch if condition.donors is None else self.with_images_of(batch, condition.donors)
            memory = think(self.model, asked, condition.transform(batch) if condition.transform else None)
            if condition.edit is not None:
                memory = condition.edit(memory, batch)
            nats += likelihood(self.model, memory, batch)
            texts = answer(self.model, memory, self.max_new_tokens)
            tokens += [min(len(ids) + 1, self.max_new_tokens) for ids in texts]
            answers += [extract_answer(self.tokenizer.decode(ids)) for ids in texts]
        correct = tuple(exact_match(said, s.answer) for said, s in zip(answers, self.samples, strict=True))
        return Outcome(tuple(answers), correct, tuple(nats), tuple(tokens))

    # -- what thoughts can be replaced by --

    def fed(self, chosen: Callable[[int], Tensor]) -> MakeTransform:
        """Feeds back the thoughts [T, H] that `chosen` gives for a sample."""

        def make(batch: Prompts) -> Any:
            rows = [chosen(row) for row in batch.rows]
            return given_thoughts(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), batch.number_BK)

        return make

    def noise(self, batch: Prompts) -> Any:
        ids = batch.tensors["input_ids"]
        return noise_like_thoughts(ids, self.model.latent_token_id, batch.keys, self.seed)

    def of_other(self, donors: Sequence[int | None]) -> MakeTransform:
        return self.fed(lambda row: self.thoughts[_donor(donors, row)])

    def mean_thoughts(self) -> Tensor:
        """[T, H]: the mean of each thought over the samples that have it."""
        return torch.stack(
            [torch.stack([t[k] for t in self.thoughts if len(t) > k]).mean(0) for k in range(self.n_thoughts)]
        )


def _donor(donors: Sequence[int | None], row: int) -> int:
    """The sample that gives; the one itself where none was found."""
    donor = donors[row]
    return row if donor is None else donor


def at_thoughts(make: MakeTransform, chosen: Sequence[int]) -> MakeTransform:
    """The same replacement at some thoughts only."""
    return lambda batch: only_thoughts(make(batch), chosen, batch.number_BK)


def cut(chosen: Sequence[int] | None = None) -> Edit:
    """Hides the keys and values of thoughts (all, or those of these numbers) from the answer."""

    def edit(memory: Memory, batch: Prompts) -> Memory:
        hidden_BC = batch.latent_mask.clone()
        if chosen is not None:
            columns = hidden_BC.any(0).nonzero().flatten()
            hidden_BC[:, columns] = torch.isin(batch.number_BK, torch.tensor(list(chosen)))
        return memory.without(hidden_BC)

    return edit


def conditions(study: Study) -> list[Condition]:
    """Every condition that this model and these samples allow, the model's own thoughts first."""
    n = len(study)
    lengths = [len(thoughts) for thoughts in study.thoughts]
    means = study.mean_thoughts()
    donors = donors_within(lengths, study.seed)
    several = tuple(length > 1 for length in lengths)
    found = [
        Condition("own", "its own thoughts"),
        Condition("zeros", "zeros", transform=study.fed(lambda row: torch.zeros_like(study.thoughts[row]))),
        Condition("noise", "noise of the same norm", transform=study.noise),
        Condition("mean", "the mean thought", transform=study.fed(lambda row: means[: lengths[row]])),
    ]
    if any(donor is not None for donor in donors):
        covered = tuple(donor is not None for donor in donors)
        found.append(
            Condition("other", "another question's thoughts", transform=study.of_other(donors), covered=covered)
        )
    if any(several):
        order = [other_order(lengths[i], study.seed, study.samples[i].key) for i in range(n)]
        shuffled = study.fed(lambda row: study.thoughts[row][order[row]])
        found.append(Condition("order", "its thoughts in another order", transform=shuffled, covered=several))
    found.append(Condition("cut", "thoughts cut from memory", edit=cut()))
    found += _image_conditions(study)
    if 1 < study.n_thoughts <= MAX_THOUGHTS_ALONE:
        for k in range(study.n_thoughts):
            has = tuple(length > k for length in lengths)
            others = [t for t in range(study.n_thoughts) if t != k]
            noisy = at_thoughts(study.noise, [k])
            found += [
                Condition(f"noise_{k + 1}", "noise", "alone", noisy, covered=has, thought=k),
                Condition(f"cut_{k + 1}", "cut", "alone", edit=cut([k]), covered=has, thought=k),
                Condition(f"only_{k + 1}", "only this one kept", "alone", edit=cut(others), covered=has, thought=k),
            ]
    return found


def _image_conditions(study: Study) -> list[Condition]:
    # Only pictures cut into as many tiles put their tokens into the same columns.
    tiles = [feature["num_patches"] for feature in study.features]
    donors = donors_within([n if n else f"none {i}" for i, n in enumerate(tiles)], study.seed + 1)
    covered = tuple(donor is not None for donor in donors)
    if not any(covered):
        return []

    def swap(memory: Memory, batch: Prompts) -> Memory:
        image_BC = torch.eq(batch.tensors["input_ids"][:, :-1], study.model.backbone.image_token_id or -1)
        return memory.with_columns_of(think(study.model, study.with_images_of(batch, donors)), image_BC)

    return [
        Condition("image", "another picture from the beginning", "image", donors=donors, covered=covered),
        Condition("image_after", "another picture after thinking", "image", edit=swap, covered=covered),
    ]


def effects(conditions: Sequence[Condition], outcomes: dict[str, Outcome], seed: int) -> list[dict[str, Any]]:
    """Rows of the causal table: each condition, and its difference to the model's own thoughts on the same samples."""
    own = outcomes["own"]
    rows = []
    for condition in conditions:
        outcome = outcomes[condition.name]
        chosen = [i for i in range(len(own.correct)) if condition.covered is None or condition.covered[i]]
        right = sum(outcome.correct[i] for i in chosen)
        low, high = wilson_interval(right, len(chosen))
        accuracy = {"mean": right / len(chosen), "low": low, "high": high, "n": len(chosen)}
        change = estimate([float(outcome.correct[i]) - float(own.correct[i]) for i in chosen], seed)
        nats = estimate([outcome.nats[i] - own.nats[i] for i in chosen], seed)
        rows.append(
            {
                "name": condition.name,
                "label": condition.label,
                "group": condition.group,
                "thought": condition.thought,
                "accuracy": accuracy,
                "change": change.to_dict(),
                "nats": sum(outcome.nats[i] for i in chosen) / len(chosen),
                "nats_change": nats.to_dict(),
                "tokens": sum(outcome.tokens[i] for i in chosen) / len(chosen),
            }
        )
    return rows
