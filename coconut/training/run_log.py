"""What a run says of itself: rows of metrics, and the lines that a person reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coconut.data.plan import EpochPlan
from coconut.training.inputs import TrainingInputs
from coconut.training.live_view import LiveView
from coconut.training.metrics import MetricsWriter, Totals, progress_line
from coconut.training.plan_facts import plan_facts, plan_lines
from coconut.training.stages import StageManager
from coconut.training.state import TrainState
from coconut.utils.device import take_memory_peak
from coconut.utils.distributed import all_reduce_sum, get_rank, get_world_size, is_main_process
from coconut.utils.logging import get_logger

logger = get_logger(__name__)


class RunLog:
    """Writes RUN/metrics.jsonl and log lines from the main process; every rank must call each method.

    Args:
        run_dir: RUN.
        stages: the curriculum.
        peak_flops: operations a second that one rank's device can do at most, where that is known.
        view: shows what is written.
    """

    def __init__(self, run_dir: Path, stages: StageManager, peak_flops: float | None, view: LiveView) -> None:
        self.metrics = MetricsWriter(run_dir)
        self.view = view
        self.stages = stages
        self.peak_flops = peak_flops
        self._planned: int | None = None  # the stage whose plan was said

    def training(self, state: TrainState, window: Totals, engine: Any, steps: int | None) -> None:
        """The steps since the last such row.

        Args:
            window: sums over those steps; its ``loss_sum`` and ``loader_wait_s`` are this rank's. Logged is the
                longest wait of any rank, since the others wait for that one; and the most memory.
            engine: says learning rate and gradient norm, and holds the model.
            steps: optimizer steps of the epoch, where they are known.
        """
        world, norms = get_world_size(), engine.module.norms.take()
        own = [0.0] * (2 * world)
        own[get_rank()], own[world + get_rank()] = window.loader_wait_s, float(take_memory_peak())
        sums = all_reduce_sum([window.loss_sum, *norms, *own])  # one collective gives sums and maxima
        window.loss_sum, norms, own = sums[0], sums[1 : 1 + len(norms)], sums[1 + len(norms) :]
        window.loader_wait_s = max(own[:world])
        norm = engine.get_global_grad_norm()
        rates = window.rates(None if self.peak_flops is None else self.peak_flops * world, norms)
        self._write(
            "train",
            state,
            **rates,
            lr=engine.optimizer.param_groups[0]["lr"],
            grad_norm=float(norm) if norm is not None else None,
            memory_bytes=int(max(own[world:])),
        )
        where, done, total = self._position(state, steps)
        seconds_left = None if total is None else (total - done) * rates["step_s"]
        logger.info(progress_line(where, rates, seconds_left))

    def step(self, state: TrainState, steps: int | None) -> None:
        """One step more; `steps` as in `training`."""
        self.view.step(*self._position(state, steps))

    def _position(self, state: TrainState, steps: int | None) -> tuple[str, int, int | None]:
        """In words; steps of the stage that are done; how many it has at most, where that is known."""
        settings = self.stages.settings(state.stage)
        if settings.epochs is None:
            return f"stage {state.stage}  step {state.stage_step}/{settings.steps}", state.stage_step, settings.steps
        where = f"stage {state.stage}  epoch {state.stage_epoch + 1}/{settings.epochs}  step {state.epoch_step}"
        if steps is None:
            return where, state.epoch_step, None
        return f"{where}/{steps}", state.stage_epoch * steps + state.epoch_step, settings.epochs * steps

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
        self.view.row(kind, values)
