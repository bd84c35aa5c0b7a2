"""After a step that was skipped: say what was seen, go back to the last checkpoint, or give up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coconut.training.checkpoint import CheckpointFolder, load_checkpoint, read_checkpoint
from coconut.training.engine import reset_optimizer
from coconut.training.run_log import RunLog
from coconut.training.state import TrainState
from coconut.training.step import StepResult
from coconut.types import Batch, TrainingError
from coconut.utils.distributed import all_gather_object, on_main_first
from coconut.utils.logging import get_logger

logger = get_logger(__name__)


class Recovery:
    """Counts skipped steps and rollbacks of one run, in its TrainState; decides alike on every rank.

    Args:
        checkpoints: where there is something to go back to.
        log: takes a row for each skipped step and rollback.
        config: ``max_skipped_steps``, ``max_rollbacks``, ``reset_optimizer``.
    """

    def __init__(self, checkpoints: CheckpointFolder, log: RunLog, config: Any) -> None:
        self.checkpoints, self.log, self.config = checkpoints, log, config

    def after_skip(self, engine: Any, state: TrainState, result: StepResult, batches: Sequence[Batch]) -> bool:
        """Say which step was skipped and why; True when weights and optimizer went back.

        Raises:
            TrainingError: it was one too many, and there is nothing, or nothing more, to go back to.
        """
        state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
        seen = all_gather_object((result.loss_sum, [key for batch in batches for key in batch.keys]))
        ranks = {str(rank): {"loss_sum": loss_sum, "keys": keys} for rank, (loss_sum, keys) in enumerate(seen)}
        self.log.anomaly(state, fault=result.fault, loss=result.loss, ranks=ranks)
        of_ranks = (
            f"rank {rank}: loss sum {loss:.4g} over {', '.join(keys)}" for rank, (loss, keys) in enumerate(seen)
        )
        text = f"step {state.step}: {result.fault}; {'; '.join(of_ranks)}"
        logger.warning("skipped %s", text)
        if state.skipped_in_row < self.config.max_skipped_steps:
            return False
        self._roll_back(engine, state, text)
        return True

    def _roll_back(self, engine: Any, state: TrainState, seen: str) -> None:
        """The last checkpoint's weights and optimizer; the position stays, so the data since then are passed over."""
        self.checkpoints.settle()  # a checkpoint that is being written counts, and outlives the run if this ends it
        most = self.config.max_rollbacks
        advice = f"The last: {seen}. Look at these samples, or lower learning_rate"
        in_row = f"{state.skipped_in_row} steps in a row were skipped"
        if state.rollbacks >= most:
            raise TrainingError(
                f"{in_row}, after {state.rollbacks} rollback(s) (max_rollbacks = {most}). {advice}, or allow more with "
                "max_skipped_steps and max_rollbacks"
            )
        folder = self.checkpoints.newest_valid()
        if folder is None:
            raise TrainingError(
                f"{in_row}, and there is no checkpoint to go back to. {advice}, or save sooner with save_every_n_steps"
            )
        found = on_main_first(lambda: read_checkpoint(folder, self.checkpoints.run))
        load_checkpoint(engine, found)
        is_same_stage = found.state.stage == state.stage
        if not is_same_stage and self.config.reset_optimizer:
            reset_optimizer(engine)
        state.roll_back_to(found.state, is_same_stage=is_same_stage)
        self.log.anomaly(state, fault="rollback", to_step=found.state.step, rollbacks=state.rollbacks)
        text = "went back to the weights of %s (%d of at most %d times); the data after it are passed over"
        logger.warning(text, folder, state.rollbacks, most)
