"""Everything a run needs to go on where it stopped, besides weights and optimizer: one value, saved with them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from coconut.training.anomalies import remember
from coconut.types import CheckpointError

if TYPE_CHECKING:
    from coconut.training.step import StepPlan


@dataclass
class TrainState:
    """Where a run stands. Positions count what is *done*.

    No random state is in here: every draw comes from a hash of the seed, the step and the sample's key.
    """

    stage: int = 0
    stage_epoch: int = 0  # epochs done in this stage
    stage_step: int = 0  # optimizer steps done in this stage
    epoch: int = 0  # epochs done in the whole run; chooses the data order
    epoch_step: int = 0  # optimizer steps done in the current epoch
    step: int = 0  # optimizer steps done in the whole run
    steps_since_reset: int = 0  # optimizer steps since the optimizer was fresh; drives the warm-up
    samples: int = 0
    bad_samples: int = 0  # left out because they could not be used; one that comes in two epochs counts twice
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0  # of training steps, validation and saving not counted
    samples_per_step: int = 0  # of this stage; fixed, as the data order hangs on it
    slots: int = 0  # micro-batches of an optimizer step over all ranks, in this stage; balance=cost hangs on it
    group: int = 0  # slots balanced against one another: the ranks of the first start
    validated_step: int = -1  # of the last validation
    validation: dict[str, float] = field(default_factory=dict)  # what it said: loss, accuracy, full_match
    best_score: float | None = None  # of this stage's validations, by validation_metric; higher is better
    best_step: int = -1
    gain_from: float | None = None  # the last score that was a gain; the next has to be better than this
    validations_without_gain: int = 0
    stage_done: bool = False  # the stage's target was met, or its epochs or patience are over
    skipped: int = 0  # steps of the whole run whose update was dropped; they count as done
    skipped_in_row: int = 0  # the last so many
    rollbacks: int = 0  # times that weights and optimizer went back to an earlier checkpoint
    recent_losses: list[float] = field(default_factory=list)  # of this stage's last steps; a spike is measured by them

    def next_stage(self) -> None:
        """Begin the following stage; an epoch that the one before ended in is not gone on with."""
        self.stage += 1
        self.epoch += self.epoch_step > 0
        self.stage_epoch = self.stage_step = self.epoch_step = 0
        self.samples_per_step = self.slots = 0
        self.best_score = self.gain_from = None
        self.best_step = -1
        self.validations_without_gain = 0
        self.stage_done = False
        self.recent_losses = []

    def judge(self, metrics: dict[str, float], metric: str, min_delta: float) -> bool:
        """Take note of a validation.

        Args:
            metrics: ``loss``, ``accuracy`` and ``full_match``.
            metric: which of them counts.
            min_delta: least change of it that is a gain; smaller ones in a row add up to one.

        Returns:
            whether the model is the best of its stage.
        """
        self.validated_step, self.validation = self.step, metrics
        score = -metrics[metric] if metric == "loss" else metrics[metric]
        is_sound = not math.isnan(score)  # NaN is less than nothing, and would never be beaten
        is_best = is_sound and (self.best_score is None or score > self.best_score)
        if is_best:
            self.best_score, self.best_step = score, self.step
        if is_sound and (self.gain_from is None or score > self.gain_from + min_delta):
            self.gain_from, self.validations_without_gain = score, 0
        else:
            self.validations_without_gain += 1
        return is_best

    def count(self, plan: StepPlan, flops: float) -> None:
        """One more step is done, whether its update was applied or dropped."""
        self.step, self.stage_step, self.epoch_step = self.step + 1, self.stage_step + 1, self.epoch_step + 1
        self.samples, self.tokens = self.samples + plan.samples, self.tokens + plan.tokens
        self.bad_samples += plan.bad_samples
        self.flops += flops

    def accept(self, loss: float) -> None:
        """The step's update was applied."""
        self.steps_since_reset += 1
        self.skipped_in_row = 0
        remember(loss, self.recent_losses)

    def roll_back_to(self, earlier: TrainState, is_same_stage: bool) -> None:
        """Weights and optimizer are those of `earlier` again; the place in the data stays."""
        self.steps_since_reset = earlier.steps_since_reset if is_same_stage else 0
        self.recent_losses = []
        self.skipped_in_row = 0
        self.rollbacks += 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Raises: CheckpointError: fields of another version of this project."""
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"the checkpoint's state does not fit this version: {error}") from error
