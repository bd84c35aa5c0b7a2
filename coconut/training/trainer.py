"""`MultimodalCoTTrainer`: the stages of the curriculum, one after the other, on a DeepSpeed engine.

for stage:  reset optimizer -> for epoch: train_epoch -> validate -> save_checkpoint -> (advance?) -> RUN/stage_K/
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from coconut.config.deepspeed import batch_geometry
from coconut.data.collate import MultimodalCollator
from coconut.data.encode import SampleEncoder
from coconut.data.stage_text import build_prompt_template
from coconut.evaluation.flops import training_flops
from coconut.model import MultimodalCoconut
from coconut.training.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    locked_run,
    read_checkpoint,
    replace_folder,
    set_aside,
)
from coconut.training.engine import build_engine, gathered_state_dict, is_owned, reset_optimizer, set_learning_rate
from coconut.training.inputs import TrainingInputs
from coconut.training.metrics import MetricsWriter, Totals, progress_line
from coconut.training.stages import StageManager
from coconut.training.state import TrainState
from coconut.training.validation import as_batch, to_device, validate
from coconut.types import Batch, ConfigError
from coconut.utils.distributed import (
    all_reduce_sum,
    barrier,
    get_world_size,
    init_distributed_training,
    is_main_process,
    on_main_first,
)
from coconut.utils.logging import get_logger
from coconut.utils.seed import set_seed

logger = get_logger(__name__)

#: What a run keeps from its first step to its last; a checkpoint written with other values is of another run.
FIXED_SETTINGS = (
    "seed", "method", "c_thought", "max_latent_stage", "pad_latent_to_max", "model_id", "load_model_path",
    "train_data_path", "max_train_samples", "samples_per_epoch", "balance", "image_size", "max_num_patches",
    "use_thumbnail", "dynamic_preprocess", "prompt_format", "bf16", "fp16",
)  # fmt: skip


class MultimodalCoTTrainer:
    """Trains a `MultimodalCoconut` through its stages.

    Args:
        model: the model; the DeepSpeed engine takes it over when training starts.
        tokenizer: from `load_tokenizer`.
        image_processor: None for text-only data.
        config: the run configuration; results go to ``config.run_dir``.

    Raises:
        ConfigError, DataError: configuration or data are unusable.
    """

    def __init__(self, model: MultimodalCoconut, tokenizer: Any, image_processor: Any, config: Any) -> None:
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
        self.settings = {name: getattr(config, name) for name in FIXED_SETTINGS}
        self.checkpoints = CheckpointFolder(self.run_dir / "checkpoints", config.max_checkpoints, self.settings)
        self.metrics = MetricsWriter(self.run_dir)
        self.state = TrainState()
        self.geometry = batch_geometry(config, get_world_size())
        self._locks = ExitStack()  # held as long as the trainer lives

    @cached_property
    def engine(self) -> Any:
        """The DeepSpeed engine; built at its first use, resumed from the run folder's newest checkpoint."""
        set_seed(self.config.seed)
        init_distributed_training(force=True)
        on_main_first(lambda: self._locks.enter_context(locked_run(self.run_dir)))
        start = on_main_first(self._where_to_go_on)
        engine = build_engine(self.model, self.config, self.run_dir)
        if start is not None:
            folder, self.state = start
            load_checkpoint(engine, folder)
        self.state.samples_per_step = self.geometry.samples
        self.state.group = self.state.group or get_world_size()
        if is_main_process():
            self.config.save(self.run_dir / "config.yaml")
        return engine

    # -- the run --

    def train(self) -> None:
        """Train every stage that is not done yet, then score the test data once."""
        engine = self.engine
        if (self._out_of_budget() or self._all_stages_done()) and on_main_first(self._final_step) == self.state.step:
            logger.info("nothing is left to do in %s; choose another name, or resume=none to start again", self.run_dir)
            return
        logger.info("%d ranks, stages %s, %s", get_world_size(), self.stages.stages, type(engine.optimizer).__name__)
        for stage in self.stages.stages:
            is_done = stage < self.state.stage or (stage == self.state.stage and self.state.stage_done)
            if not is_done and not self._out_of_budget():
                self._train_stage(stage)
        self.model.stage_spec = self.stages.spec(self.state.stage)
        if self.inputs.test is not None:
            loader = self.inputs.evaluation_loader(self.inputs.test, self.state.stage)
            self._log_validation("test", self.validate(loader))
        self._export("final")

    def _train_stage(self, stage: int) -> None:
        state, settings = self.state, self.stages.settings(stage)
        if stage > state.stage:
            state.next_stage()
        if state.stage_step == 0 and self.config.reset_optimizer:
            reset_optimizer(self.engine)
            state.steps_since_reset = 0
        self.model.stage_spec = self.stages.spec(stage)
        while not state.stage_done and not self._out_of_budget():
            loader = self.inputs.train_loader(stage, state.epoch, state.epoch_step, self.geometry, state.group)
            self.train_epoch(state.epoch, loader)
            if state.epoch_step < len(loader.plan):  # max_steps fell inside the epoch
                break
            state.stage_epoch, state.epoch, state.epoch_step = state.stage_epoch + 1, state.epoch + 1, 0
            metrics = self._validate_stage(stage, settings.advance_at)
            state.stage_done = state.stage_done or state.stage_epoch >= settings.epochs
            is_due = state.stage_epoch % self.config.save_every_n_epochs == 0
            if self.config.save_only_improve:
                is_due = metrics.get("improved", 0.0) == 1.0
            if is_due and not state.stage_done:
                self.save_checkpoint(state.epoch, metrics)
        if state.stage_done:
            self.metrics.write("stage", **self._position(), **self.stages.get_stage_config(stage))
            self._export(f"stage_{stage}")
        self.save_checkpoint(state.epoch, {})

    def _all_stages_done(self) -> bool:
        return self.state.stage_done and self.state.stage == self.stages.stages[-1]

    def _out_of_budget(self) -> bool:
        config, state = self.config, self.state
        steps_spent = config.max_steps is not None and state.step >= config.max_steps
        return steps_spent or (config.num_epochs is not None and state.epoch >= config.num_epochs)

    def _validate_stage(self, stage: int, advance_at: float | None) -> dict[str, float]:
        """Validate when it is due, and decide whether the stage is over."""
        state, config = self.state, self.config
        if self.inputs.validation is None or state.stage_epoch % config.eval_every_n_epochs:
            return {}
        metrics = self.validate(self.inputs.evaluation_loader(self.inputs.validation, stage))
        self._log_validation("val", metrics)
        improved = metrics["accuracy"] > state.best_accuracy + config.early_stopping_min_delta
        if improved:
            state.best_accuracy, state.validations_without_gain = metrics["accuracy"], 0
        else:
            state.validations_without_gain += 1
        patience = config.early_stopping_patience
        if advance_at is not None and metrics["full_match"] >= advance_at:
            state.stage_done = True
        elif patience is not None and state.validations_without_gain >= patience:
            logger.info("stage %d ends: no gain in %d validations", stage, patience)
            state.stage_done = True
        return {**metrics, "improved": float(improved)}

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
        save_every = self.config.save_every_n_steps
        begin = time.perf_counter()
        while not self._out_of_budget():
            micro_batches = list(islice(batches, accumulation))
            if not self._train_step(micro_batches, accumulation, whole, window):
                break
            self.state.seconds += time.perf_counter() - begin
            at_end = steps is not None and self.state.epoch_step == steps
            if self.state.step % self.config.log_every_n_steps == 0 or at_end:
                self._log_training(window, epoch, steps)
                window = Totals()
            if save_every is not None and self.state.step % save_every == 0 and not at_end:
                self.save_checkpoint(epoch, {})
            begin = time.perf_counter()
        if steps is None:  # somebody else's data: no place in a plan of ours
            self.state.epoch_step = position
        loss_sum = all_reduce_sum([whole.loss_sum])[0]
        return {
            "loss": loss_sum / max(whole.label_tokens, 1),
            "tokens": float(whole.tokens),
            "seconds": whole.seconds,
        }

    def _train_step(self, micro_batches: list[Batch], accumulation: int, whole: Totals, window: Totals) -> bool:
        """One optimizer step on all ranks; False, and nothing done, when a rank has no batch left."""
        engine, state, world = self.engine, self.state, get_world_size()
        patches = sum(
            int(batch.tensors["num_patches"].sum()) for batch in micro_batches if "num_patches" in batch.tensors
        )
        counts = all_reduce_sum(
            [
                len(micro_batches),
                sum(batch.n_label_tokens for batch in micro_batches),
                sum(len(batch.keys) for batch in micro_batches),
                sum(batch.n_tokens for batch in micro_batches),
                patches,
            ]
        )
        n_batches, n_labels, n_samples, n_tokens, n_patches = (int(count) for count in counts)
        if n_batches < accumulation * world:
            return False
        settings = self.stages.settings(state.stage)
        warm = min(1.0, (state.steps_since_reset + 1) / max(settings.warmup_steps, 1))
        set_learning_rate(engine, settings.learning_rate * warm)
        # Draws such as dropout depend on the step alone, so that a resumed run repeats them.
        torch.manual_seed((self.config.seed * 1_000_003 + state.step) % 2**63)
        loss_sum = 0.0
        for batch in micro_batches:
            # The engine averages over ranks: the sum over all label tokens of the step, divided by their number.
            output = engine(
                **to_device(batch, self.model.device), loss_only=True, num_items_in_batch=max(n_labels, 1) / world
            )
            engine.backward(output.loss, scale_wrt_gas=False)
            engine.step()
            loss_sum += float(output.loss.detach()) * max(n_labels, 1) / world
        flops = training_flops(
            self.model.base_model.config,
            n_tokens,
            n_patches,
            n_samples=n_samples,
            n_logit_tokens=n_labels,
            recompute=self.config.gradient_checkpointing,
        )
        for totals in (whole, window):
            totals.loss_sum += loss_sum
            totals.label_tokens += n_labels
            totals.samples += n_samples
            totals.tokens += n_tokens
            totals.steps += 1
        state.step, state.stage_step, state.epoch_step = state.step + 1, state.stage_step + 1, state.epoch_step + 1
        state.steps_since_reset += 1
        state.samples, state.tokens, state.flops = (
            state.samples + n_samples,
            state.tokens + n_tokens,
            state.flops + flops,
        )
        return True

    # -- validation --

    def validate(self, dataloader: Iterable[Any]) -> dict[str, float]:
        """Loss by teacher forcing, accuracy by greedy generation, over all ranks.

        Args:
            dataloader: yields `Batch` or dictionaries with labels; ranks may have different numbers of batches.

        Returns:
            ``loss`` a label token, ``accuracy`` of the answers, ``full_match`` of whole texts, ``samples``.
        """
        engine = self.engine
        engine.eval()
        metrics = validate(self.model, dataloader, self.tokenizer, self.collator, self.config.max_new_tokens)
        engine.train()
        return metrics

    # -- saving --

    def save_checkpoint(self, epoch: int, metrics: dict[str, float]) -> None:
        """Save weights, optimizer and state; every rank must call it.

        Args:
            epoch: epochs done, for the log.
            metrics: what the newest validation said, for the log.
        """
        path = self.checkpoints.save(self.engine, self.state)
        accuracy = f", accuracy {metrics['accuracy']:.1%}" if "accuracy" in metrics else ""
        logger.info("epoch %d: saved %s%s", epoch, path, accuracy)

    def _export(self, name: str) -> None:
        """RUN/name: a folder that plain transformers loads; replaced as a whole."""
        weights = gathered_state_dict(self.engine)
        if is_main_process():
            final, partial = self.run_dir / name, self.run_dir / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            self.model.metadata = {"config": self.config.to_dict(), "state": self.state.to_dict()}
            self.model.save_pretrained(partial, state_dict=weights)
            self.tokenizer.save_pretrained(partial)
            if self.image_processor is not None:
                self.image_processor.save_pretrained(partial)
            replace_folder(partial, final)
        barrier()

    def _where_to_go_on(self) -> tuple[Path, TrainState] | None:
        """The checkpoint that `resume` asks for; None to start anew. What would be in the way is moved, not deleted."""
        choice = self.config.resume
        folder = self.checkpoints.newest() if choice == "auto" else None if choice == "none" else Path(choice)
        if folder is None:
            old = set_aside(self.run_dir, ("checkpoints", "stage_*", "final", "metrics.jsonl"))
            if old is not None:
                logger.info("what an earlier run left in %s is now in %s", self.run_dir, old)
            return None
        state = read_checkpoint(folder, self.settings)
        if state.samples_per_step != self.geometry.samples:
            raise ConfigError(
                f"{folder} was written with {state.samples_per_step} samples an optimizer step, this run asks for "
                f"{self.geometry.samples}; set global_batch_size={state.samples_per_step}, or start anew with "
                "resume=none"
            )
        newer = [other.name for other in self.checkpoints.complete() if other.name > folder.name]
        set_aside(self.checkpoints.folder, newer)  # else the next start would take them for the newest
        self.metrics.rewind(state.step)
        logger.info("going on from %s: stage %d, step %d", folder, state.stage, state.step)
        return folder, state

    def _final_step(self) -> int:
        """Optimizer steps of the model in RUN/final; -1 when there is none."""
        path = self.run_dir / "final" / "coconut.json"
        try:
            return int(json.loads(path.read_text())["metadata"]["state"]["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return -1

    # -- saying what happens --

    def _position(self) -> dict[str, Any]:
        state = self.state
        return {
            "step": state.step,
            "epoch": state.epoch,
            "samples": state.samples,
            "tokens": state.tokens,
            "flops": state.flops,
            "seconds": state.seconds,
        }

    def _log_training(self, window: Totals, epoch: int, steps: int | None) -> None:
        window.loss_sum = all_reduce_sum([window.loss_sum])[0]
        state, settings, rates = self.state, self.stages.settings(self.state.stage), window.rates()
        norm = self.engine.get_global_grad_norm()
        self.metrics.write(
            "train",
            stage=state.stage,
            **self._position(),
            **rates,
            lr=self.engine.optimizer.param_groups[0]["lr"],
            grad_norm=float(norm) if norm is not None else None,
        )
        where = f"stage {state.stage}  epoch {state.stage_epoch + 1}/{settings.epochs}  step {state.epoch_step}"
        seconds_left = None
        if steps is not None:
            where += f"/{steps}"
            left = (settings.epochs - state.stage_epoch) * steps - state.epoch_step
            seconds_left = left * window.seconds / max(window.steps, 1)
        logger.info(progress_line(where, rates, seconds_left))

    def _log_validation(self, kind: str, metrics: dict[str, float]) -> None:
        self.metrics.write(
            kind, stage=self.state.stage, **self._position(), **{k: v for k, v in metrics.items() if k != "samples"}
        )
        logger.info(
            "%s  stage %d  loss %.4f  answers right %.1f %%  whole text right %.1f %%  (%d samples)",
            kind,
            self.state.stage,
            metrics["loss"],
            100 * metrics["accuracy"],
            100 * metrics["full_match"],
            metrics["samples"],
        )
