"""Everything a run needs to go on where it stopped, besides weights and optimizer: one value, saved with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from coconut.types import CheckpointError


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
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0  # of training steps, validation and saving not counted
    samples_per_step: int = 0  # fixed at the first start, as the data order hangs on it
    group: int = 0  # slots balanced against one another: the ranks of the first start
    best_accuracy: float = -1.0  # of this stage's validations
    validations_without_gain: int = 0
    stage_done: bool = False  # the stage's target was met, or its epochs or patience are over

    def next_stage(self) -> None:
        """Begin the following stage."""
        self.stage += 1
        self.stage_epoch = self.stage_step = self.epoch_step = 0
        self.best_accuracy = -1.0
        self.validations_without_gain = 0
        self.stage_done = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Raises: CheckpointError: fields of another version of this project."""
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"the checkpoint's state does not fit this version: {error}") from error
