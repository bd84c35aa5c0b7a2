"""`MultimodalCoTTrainer`: the stages of the curriculum, one after the other, on a DeepSpeed engine.

for stage:  reset optimizer -> for epoch: train_epoch -> validate -> save_checkpoint -> (advance?) -> RUN/stage_K/
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from coconut.data.bad_samples import BadSample, bad_samples_of
from coconut.data.collate import MultimodalCollator
from coconut.data.encode import SampleEncoder
from coconut.data.stage_text import build_prompt_template
from coconut.evaluation.flops import training_flops
from coconut.model import MultimodalCoconut
from coconut.training.anomalies import judge_loss
from coconut.training.bad_samples import BadSampleReport
from coconut.training.batches import set_geometry, stage_geometry
from coconut.training.checkpoint import CheckpointFolder, load_checkpoint
from coconut.training.engine import build_engine, is_owned, reset_optimizer, set_learning_rate
from coconut.training.export import best_name, export_model, exported_step, mark_stage_done, settle_best
from coconut.training.inputs import TrainingInputs
from coconut.training.live_view import LiveView
from coconut.training.memory import explaining_memory
from coconut.training.metrics import Totals
from coconut.training.recovery import Recovery
from coconut.training.resume import find_start, fixed_settings, last_stage, say_changes, take_run
from coconut.training.run_folder import CONFIG_FILE
from coconut.training.run_log import RunLog
from coconut.training.schedule import is_at_bound, is_validation_due, reason_to_end
from coconut.training.stages import StageManager
from coconut.training.state import TrainState
from coconut.training.step import NO_LABELS, StepPlan, agree, batch_cost, seed_step, take_step
from coconut.training.stop import StopRequests, noting_signals
from coconut.training.validation import as_batch, validate
from coconut.training.watchdog import Watchdog
from coconut.types import Batch, CheckpointError, ConfigError, DataError
from coconut.utils.device import device_name, peak_flops
from coconut.utils.distributed import (
    all_reduce_sum,
    collective_timeout_s,
    get_world_size,
    init_distributed_training,
    is_main_process,
    on_main_first,
)
from coconut.utils.logging import get_logger
from coconut.utils.seed import set_seed

logger = get_logger(__name__)


class MultimodalCoTTrainer:
    """Trains a `MultimodalCoconut` through its stages.

    Args:
        model: the model; the DeepSpeed engine takes it over when training starts.
        tokenizer: from `load_tokenizer`.
        image_processor: None for text-only data.
        config: the run configuration; results go to ``config.run_dir``.
        is_dry: get ready as for training, and write nothing to the run folder nor move anything in it (`dry_run`).

    Raises:
        ConfigError, DataError: configuration or data are unusable.
    """

    def __init__(
        self, model: MultimodalCoconut, tokenizer: Any, image_processor: Any, config: Any, *, is_dry: bool = False
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.stages = StageManager.from_config(config)
        template = build_prompt_template(tokenizer, config.prompt_format)
        model.prompt_template = template
        encoder = SampleEncoder(tokenizer, image_processor, template, model.tokens_per_patch, config.max_length)
        self.collator = MultimodalCollator(tokenizer, image_processor, model.latent_token_id, config.pad_to_multiple_of)
        self.inputs = TrainingInputs(config, encoder, self.collator, self.stages, model.latent_ids)
        # The plan hangs on data and costs: a resumed run must not begin to take these from counts made in between.
        train = self.inputs.train
        data = (
            {} if train is None else {"token_counts": train.token_counts, "contents of train_data_path": train.digests}
        )
        self.checkpoints = CheckpointFolder(
            self.run_dir / "checkpoints", config.max_checkpoints, fixed_settings(config) | data
        )
        view = LiveView(config.live_view, f"{config.name}  {config.method}")
        self.log = RunLog(self.run_dir, self.stages, peak_flops(config.peak_tflops, device_name()), view)
        self.bad_samples = BadSampleReport(self.run_dir, config.max_bad_fraction)
        self.recovery = Recovery(self.checkpoints, self.log, config)
        self.watchdog = Watchdog(config.hang_timeout_s, self.run_dir)
        self.is_dry = is_dry
        self.state = TrainState(stage=self.stages.stages[0])
        self.geometry = stage_geometry(config, self.state.stage, self.state)
        self.stops = StopRequests(self.run_dir)
        self.stop_reason: str | None = None
        self.last_stage = last_stage(config.stop_after_stage, self.stages.stages)

    @cached_property
    def engine(self) -> Any:
        """The DeepSpeed engine; built at its first use, resumed from the run folder's newest checkpoint."""
        set_seed(self.config.seed)
        init_distributed_training(force=True, timeout_s=collective_timeout_s(self.config.hang_timeout_s))
        if not self.is_dry:
            on_main_first(lambda: take_run(self.run_dir))
            self.bad_samples.load()
        start = find_start(self.checkpoints, self.config.resume, look_only=self.is_dry)
        if start is not None:
            self.state = start.state
            self.geometry = stage_geometry(self.config, self.state.stage, self.state)
            self.watchdog.step = self.state.step
        engine = build_engine(self.model, self.config, None if self.is_dry else self.run_dir, self.geometry)
        if start is not None:
            load_checkpoint(engine, start)
        self.state.group = self.state.group or get_world_size()
        if is_main_process() and not self.is_dry:
            if start is not None:
                say_changes(self.run_dir, self.config)
            self.config.save(self.run_dir / CONFIG_FILE)
            ds_config = json.loads((self.run_dir / "ds_config.json").read_text())
            self.log.metrics.open_monitors(ds_config, self.state.step)
        return engine

    # -- the run --

    def train(self) -> None:
        """Train every stage that is not done yet, then score the test data once.

        Stops before that, with a checkpoint, where `stop_after_stage` or a stop request says so.
        """
        with noting_signals(), self.watchdog, self.log.view, explaining_memory(self.watchdog, self.config):
            self._train()
            self.checkpoints.settle()

    def _train(self) -> None:
        engine, last = self.engine, self.stages.stages[-1]
        exported = on_main_first(lambda: exported_step(self.run_dir / "final"))
        if (self.out_of_budget() or self._is_done(last)) and exported == self.state.step:
            logger.info("nothing is left to do in %s; choose another name, or resume=none to start again", self.run_dir)
            return
        logger.info("%d ranks, stages %s, %s", get_world_size(), self.stages.stages, type(engine.optimizer).__name__)
        for stage in self.stages.stages:
            if stage > self.last_stage:
                break
            if not self._is_done(stage) and not self._is_over():
                self._train_stage(stage)
            if self._is_done(stage):
                self._export_stage(stage)
                mark_stage_done(self.run_dir, stage, self.state)
        if self.stop_reason is not None:
            self.stops.write(self.state.stage, self.state.step, self.stop_reason)
            logger.info("stopped (%s) after step %d; the same command goes on", self.stop_reason, self.state.step)
            return
        if self.last_stage < last and not self.out_of_budget():
            logger.info("stage %d is done: stop_after_stage ends the run here", self.last_stage)
            return
        self.model.stage_spec = self.stages.spec(self.state.stage)
        if self.inputs.test is not None:
            loader = self.inputs.evaluation_loader(self.inputs.test, self.state.stage)
            self.log.validation("test", self.state, self.validate(loader))
        self._export("final")

    def _train_stage(self, stage: int) -> None:
        state = self.state
        if stage > state.stage:
            state.next_stage()
        self._set_geometry()
        if state.stage_step == 0 and self.config.reset_optimizer:
            reset_optimizer(self.engine)
            state.steps_since_reset = 0
        self.model.stage_spec = self.stages.spec(stage)
        self._after_step(epoch_ended=False)  # a checkpoint written by a rollback comes before that
        while not state.stage_done and not self._is_over():
            loader = self.inputs.train_loader(stage, state.epoch, state.epoch_step, self.geometry, state.group)
            self.log.plan(state, self.inputs, loader.plan)
            self.train_epoch(state.epoch, loader)
            if state.epoch_step < len(loader.plan):  # max_steps, a stop or the stage's end fell inside the epoch
                break
            state.stage_epoch, state.epoch, state.epoch_step = state.stage_epoch + 1, state.epoch + 1, 0
            metrics = self._after_step(epoch_ended=True)
            is_due = not self.config.save_only_improve and state.stage_epoch % self.config.save_every_n_epochs == 0
            if (is_due or self._is_save_due()) and not state.stage_done:
                self._save_if_possible(metrics)
        if state.stage_done:
            self.log.stage_end(state)
            on_main_first(lambda: settle_best(self.run_dir, stage, state.best_step))
        self.checkpoints.settle()
        if self.checkpoints.saved != state.to_dict():
            self.save_checkpoint(state.epoch, self._metrics_now())

    def _is_save_due(self) -> bool:
        """Whether `save_every_n_steps` asks for a checkpoint of this step."""
        every = self.config.save_every_n_steps
        return every is not None and self.state.step % every == 0

    def _set_geometry(self) -> None:
        """The step of the stage that begins, or goes on."""
        state = self.state
        self.geometry = stage_geometry(self.config, state.stage, state)
        set_geometry(self.engine, self.geometry)
        state.samples_per_step, state.slots = self.geometry.samples, state.slots or self.geometry.slots

    def _is_done(self, stage: int) -> bool:
        return stage < self.state.stage or (stage == self.state.stage and self.state.stage_done)

    def _is_over(self) -> bool:
        return self.stop_reason is not None or self.out_of_budget()

    def out_of_budget(self) -> bool:
        """Whether `max_steps` or `num_epochs` are used up."""
        config, state = self.config, self.state
        steps_spent = config.max_steps is not None and state.step >= config.max_steps
        return steps_spent or (config.num_epochs is not None and state.epoch >= config.num_epochs)

    def _after_step(self, epoch_ended: bool) -> dict[str, float]:
        """Validate where that is due, keep the best, and decide whether the stage is over.

        Returns:
            what was said of the weights as they are now; empty where nothing was.
        """
        state, config, settings = self.state, self.config, self.stages.settings(self.state.stage)
        is_best = False
        if self.inputs.validation is not None and is_validation_due(
            state, settings, epoch_ended, config.eval_every_n_epochs, config.eval_every_n_steps
        ):
            metrics = self.validate(self.inputs.evaluation_loader(self.inputs.validation, state.stage))
            self.log.validation("val", state, metrics)
            is_best = state.judge(metrics, config.validation_metric, config.early_stopping_min_delta)
            if is_best:
                self._export_best()
            reason = reason_to_end(state, settings)
            if reason is not None:
                logger.info("stage %d ends: %s", state.stage, reason)
                state.stage_done = True
            if is_best and config.save_only_improve and not state.stage_done:
                self._save_if_possible(metrics)
        state.stage_done = state.stage_done or is_at_bound(state, settings, epoch_ended)
        return self._metrics_now()

    def _metrics_now(self) -> dict[str, float]:
        return self.state.validation if self.state.validated_step == self.state.step else {}

    # -- one epoch --

    def train_epoch(self, epoch: int, dataloader: Iterable[Any], optimizer: Any = None) -> dict[str, float]:
        """Train on every batch of `dataloader` once.

        Args:
            epoch: number of the epoch, for the log.
            dataloader: yields `Batch` or dictionaries as the collator makes them. An optimizer step takes the
                engine's number of accumulation steps; the epoch ends when any rank runs out.
            optimizer: may be left out, as the engine owns it.

        Returns:
            Mean ``loss`` a label token, ``tokens`` and ``seconds``, over all ranks.

        Raises:
            ConfigError: `optimizer` is not the engine's.
        """
        engine = self.engine
        if optimizer is not None and not is_owned(engine, optimizer):
            raise ConfigError("the DeepSpeed engine owns the optimizer; leave `optimizer` out or pass engine.optimizer")
        engine.train()
        accumulation = engine.gradient_accumulation_steps()
        steps = len(dataloader.plan) if hasattr(dataloader, "plan") else None
        whole, window = Totals(), Totals()
        position = self.state.epoch_step
        batches = (as_batch(item) for item in dataloader)
        is_ours = steps is not None  # else somebody's own data: no place in a plan of ours, no stage's end
        begin = time.perf_counter()
        while not self._is_over() and not (is_ours and self.state.stage_done):
            self.watchdog.enter("loading a batch")
            asked = time.perf_counter()
            micro_batches = list(islice(batches, accumulation))
            window.loader_wait_s += time.perf_counter() - asked
            if not self._train_step(micro_batches, accumulation, whole, window):
                break
            spent = time.perf_counter() - begin
            for counted in (self.state, whole, window):
                counted.seconds += spent
            self.log.step(self.state, steps)
            settings = self.stages.settings(self.state.stage)
            at_end = is_ours and (self.state.epoch_step == steps or is_at_bound(self.state, settings, False))
            if self.state.step % self.config.log_every_n_steps == 0 or at_end:
                self.log.training(self.state, window, engine, steps)
                window = Totals()
            metrics = self._after_step(epoch_ended=False) if is_ours else {}
            if self._is_save_due() and not (at_end or self.state.stage_done or self._is_over()):
                self._save_if_possible(metrics)
            begin = time.perf_counter()
        if not is_ours:
            self.state.epoch_step = position
        loss_sum = all_reduce_sum([whole.loss_sum])[0]
        return {
            "loss": loss_sum / max(whole.label_tokens, 1),
            "tokens": float(whole.tokens),
            "seconds": whole.seconds,
        }

    def _train_step(self, micro_batches: list[Batch], accumulation: int, whole: Totals, window: Totals) -> bool:
        """One optimizer step on all ranks; False, and nothing done, when a rank has no batch left or a stop is due."""
        engine, state, config = self.engine, self.state, self.config
        self.watchdog.enter("waiting for the other ranks", [key for batch in micro_batches for key in batch.keys])
        plan = agree(micro_batches, self.stops, self.bad_samples, self.checkpoints, self._cost, accumulation)
        if plan.written == get_world_size():
            self.checkpoints.settle()
        self.stop_reason = plan.stop_reason
        if plan.stop_reason is not None or plan.batches < accumulation * get_world_size():
            return False
        self._bound_bad_samples(plan, micro_batches)
        settings = self.stages.settings(state.stage)
        warm = min(1.0, (state.steps_since_reset + 1) / max(settings.warmup_steps, 1))
        set_learning_rate(engine, settings.learning_rate * warm)
        seed_step(config.seed, state.step)
        judge = partial(judge_loss, recent=state.recent_losses, sigmas=config.loss_spike_sigma)
        result = take_step(
            engine, self.model, micro_batches, plan, judge=judge, watchdog=self.watchdog, config=config
        )  # fmt: skip
        flops = self._flops(plan)
        for totals in (whole, window):
            totals.add(result.loss_sum, plan, flops, is_sound=result.fault is None)
        recomputed = flops / 3 if config.gradient_checkpointing else 0.0  # a forward pass of the three
        state.count(plan, flops + recomputed)
        self.watchdog.step = state.step
        if result.fault is None:
            state.accept(result.loss)
        elif result.fault != NO_LABELS:
            went_back = self.recovery.after_skip(engine, state, result, micro_batches)
            if went_back:
                self.save_checkpoint(state.epoch, {})  # else a run that dies now would meet the same data again
        return True

    def _bound_bad_samples(self, plan: StepPlan, micro_batches: list[Batch]) -> None:
        """Name the samples that were left out of a step about to be taken; the run ends when they are too many."""
        if plan.new_bad_samples:
            self.bad_samples.name(bad_samples_of(micro_batches))
        if plan.bad_samples:
            state = self.state
            try:
                self.bad_samples.check(state.bad_samples + plan.bad_samples, state.samples + plan.samples)
            except DataError:
                self._save_if_possible({})  # all ranks are here: the steps so far need not be taken again
                self.checkpoints.settle()
                raise

    def _cost(self, batch: Batch) -> float:
        tensors, config = batch.tensors, self.config
        columns = self.model.thought_columns(tensors["input_ids"], tensors["attention_mask"])
        return batch_cost(batch, len(columns), config.cost_per_patch, config.cost_per_latent_pass)

    def _flops(self, plan: StepPlan) -> float:
        return training_flops(
            self.model.base_model.config,
            plan.tokens,
            plan.patches,
            n_samples=plan.samples,
            n_logit_tokens=plan.label_tokens,
        )

    # -- validation --

    def validate(self, dataloader: Iterable[Any]) -> dict[str, float]:
        """Loss by teacher forcing, accuracy by greedy generation, over all ranks.

        Args:
            dataloader: yields `Batch` or dictionaries with labels; ranks may have different numbers of batches.

        Returns:
            ``loss`` a label token, ``accuracy`` of the answers, ``full_match`` of whole texts, ``samples``. A sample
            that could not be used counts as answered wrongly.

        Raises:
            DataError: too many of those.
        """
        engine = self.engine
        engine.eval()
        bad: list[BadSample] = []
        watched = self._watched(dataloader, bad)
        metrics = validate(self.model, watched, self.tokenizer, self.collator, self.config.max_new_tokens)
        engine.train()
        n_bad = int(metrics.pop("bad_samples"))
        if n_bad:
            self.bad_samples.name(bad, "evaluation")
            self.bad_samples.check(n_bad, int(metrics["samples"]) - n_bad, "evaluation")
        return metrics

    def _watched(self, dataloader: Iterable[Any], bad: list[BadSample]) -> Iterator[Batch]:
        for item in dataloader:
            batch = as_batch(item)
            bad += bad_samples_of([batch])
            self.watchdog.enter("validating", batch.keys)
            yield batch

    # -- saving --

    def save_checkpoint(self, epoch: int, metrics: dict[str, float]) -> None:
        """Save weights, optimizer and state; every rank must call it.

        Args:
            epoch: epochs done, for the log.
            metrics: what a validation of these weights said; its `validation_metric` decides which checkpoint is best.

        Raises:
            CheckpointError: the disk is full, or a rank cannot write; older checkpoints are untouched.
        """
        self._save(self.checkpoints.save, "saved", epoch, metrics)

    def _save(self, write: Any, done: str, epoch: int, metrics: dict[str, float]) -> None:
        self.watchdog.enter("saving a checkpoint")
        metric = self.config.validation_metric
        score = -metrics[metric] if metric == "loss" and metric in metrics else metrics.get(metric)
        path = write(self.engine, self.state, score)
        accuracy = f", accuracy {metrics['accuracy']:.1%}" if "accuracy" in metrics else ""
        logger.info("epoch %d: %s %s%s", epoch, done, path, accuracy)

    def _save_if_possible(self, metrics: dict[str, float]) -> None:
        """A checkpoint that training can do without: there are older ones, and more to come."""
        try:
            if self.config.async_checkpoints:
                self._save(self.checkpoints.begin, "writing, while training goes on,", self.state.epoch, metrics)
            else:
                self.save_checkpoint(self.state.epoch, metrics)
        except CheckpointError as error:
            logger.warning("training goes on without a checkpoint: %s", error)

    def _export_stage(self, stage: int) -> None:
        """RUN/stage_K/, after the checkpoint: a disk too full for it costs no step, a resumed run makes it up."""
        name = f"stage_{stage}"
        if stage == self.state.stage and on_main_first(lambda: exported_step(self.run_dir / name)) != self.state.step:
            self.model.stage_spec = self.stages.spec(stage)
            self._export(name)

    def _export_best(self) -> None:
        """A model that training can do without."""
        try:
            self._export(best_name(self.state.stage))
        except CheckpointError as error:
            logger.warning("training goes on without its best model so far: %s", error)

    def _export(self, name: str) -> None:
        self.watchdog.enter(f"exporting {name}")
        self.model.metadata = {
            "config": self.config.to_dict(),
            "state": self.state.to_dict(),
            "validation": self._metrics_now(),
        }
        processors = [self.tokenizer] + ([self.image_processor] if self.image_processor is not None else [])
        export_model(self.engine, self.model, processors, self.run_dir / name)
