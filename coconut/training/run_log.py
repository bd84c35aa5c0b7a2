"""What a run says of itself: rows of metrics, and the lines that a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coconut.data.plan import EpochPlan
from coconut.training.inputs import TrainingInputs
from coconut.training.metrics import MetricsWriter, Totals, progress_line
from coconut.training.plan_facts import plan_facts, plan_lines
from coconut.training.stages import StageManager
from coconut.training.state import TrainState
from coconut.utils.distributed import all_reduce_sum, get_rank, get_world_size, is_main_process
from coconut.utils.logging import get_logger

logger = get_logger(__name__)


class RunLog:
    """Writes RUN/metrics.jsonl and log lines from the main process; every rank must call each method."""

    def __init__(self, run_dir: Path, stages: StageManager) -> None:
        self.metrics = MetricsWriter(run_dir)
        self.stages = stages
        self._planned: int | None = None  # the stage whose plan was said

    def training(self, state: TrainState, window: Totals, engine: Any, steps: int | None) -> None:
        """The steps since the last such row.

        Args:
            window: sums over those steps; its ``loss_sum`` and ``loader_wait_s`` are this rank's. Logged is the
                longest wait of any rank, since the others wait for that one.
            engine: says learning rate and gradient norm.
            steps: optimizer steps of the epoch, where they are known.
        """
        waits = [0.0] * get_world_size()
        waits[get_rank()] = window.loader_wait_s
        window.loss_sum, *waits = all_reduce_sum([window.loss_sum, *waits])  # one collective gives sum and maximum
        window.loader_wait_s = max(waits)
        settings, rates, norm = self.stages.settings(state.stage), window.rates(), engine.get_global_grad_norm()
        self._write(
            "train",
            state,
            **rates,
            lr=engine.optimizer.param_groups[0]["lr"],
            grad_norm=float(norm) if norm is not None else None,
        )
        left: int | None = None
        if settings.epochs is None:
            assert settings.steps is not None
            where, left = f"step {state.stage_step}/{settings.steps}", settings.steps - state.stage_step
        else:
            where = f"epoch {state.stage_epoch + 1}/{settings.epochs}  step {state.epoch_step}"
            if steps is not None:
                where += f"/{steps}"
                left = (settings.epochs - state.stage_epoch) * steps - state.epoch_step
        where = f"stage {state.stage}  {where}"
        seconds_left = None if left is None else left * window.seconds / max(window.steps, 1)
        logger.info(progress_line(where, rates, seconds_left))

    def plan(self, state: TrainState, inputs: TrainingInputs, plan: EpochPlan) -> None:
        """How a stage's epochs are planned; said once, as they are alike."""
        if state.stage == self._planned or not is_main_process():
            return
        self._planned = state.stage
        facts = plan_facts(inputs, plan, state.stage, state.epoch, get_world_size())
        self._write("plan", state, **facts)
        for line in plan_lines(facts):
            logger.info("stage %d  %s", state.stage, line)

    def validation(self, kind: str, state: TrainState, metrics: dict[str, float]) -> None:
        """What a validation (``val``) or the test data (``test``) said."""
        self._write(kind, state, **{k: v for k, v in metrics.items() if k != "samples"})
        logger.info(
            "%s  stage %d  loss %.4f  answers right %.1f %%  whole text right %.1f %%  (%d samples)",
            kind,
            state.stage,
            metrics["loss"],
            100 * metrics["accuracy"],
            100 * metrics["full_match"],
            metrics["samples"],
        )

    def stage_end(self, state: TrainState) -> None:
        best = {"best_step": state.best_step, "best_score": state.best_score}
        self._write("stage", state, **self.stages.get_stage_config(state.stage), **best)

    def anomaly(self, state: TrainState, **values: Any) -> None:
        """A step that was skipped, or a rollback."""
        self._write("anomaly", state, **values)

    def _write(self, kind: str, state: TrainState, **values: Any) -> None:
        position = {name: getattr(state, name) for name in ("step", "epoch", "samples", "tokens", "flops", "seconds")}
        self.metrics.write(kind, **{"stage": state.stage, **position, **values})
