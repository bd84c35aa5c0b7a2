"""The curriculum: which stage an epoch belongs to, what a stage does to the data, and with which settings.

    epochs    0 .. e-1   e .. 2e-1   ...   K*e .. (K+1)*e-1   later (only when num_epochs asks for it)
    stage     0          1                 K                  K+1: all written steps are gone
    thoughts  none       c_thought         K * c_thought      K * c_thought

(arXiv 2412.06769, section 3 and 4.1; `epochs_per_stage` = e, `max_latent_stage` = K)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from coconut.data.stage_text import mixed_stage, smoothed_removal, stage_spec
from coconut.types import STAGED_METHODS, ConfigError, StageSpec
from coconut.utils.tokenizer import special_token_ids


@dataclass(frozen=True)
class StageSettings:
    """How one stage is trained."""

    stage: int
    epochs: int | None  # at most; `advance_at` may end it earlier; None: steps decide
    learning_rate: float
    warmup_steps: int  # optimizer steps
    uniform_prob: float  # share of samples drawn at a random stage
    advance_at: float | None  # validation full-string match that ends the stage
    steps: int | None = None  # optimizer steps, at most; None: epochs decide
    patience: int | None = None  # validations without a gain that end the stage
    min_steps: int = 0  # optimizer steps before they do


class StageManager:
    """Progression through the stages.

    Args:
        max_latent_stage: K, the last stage that removes one more written step.
        epochs_per_stage: epochs of each stage.
        c_thought: thoughts a removed step.
        method: see `coconut.data.stage_text.stage_spec`; those not in STAGED_METHODS have a single stage.
        pad_latent_to_max: samples with fewer steps get as many thoughts as the others.
        learning_rate, warmup_steps, uniform_prob, advance_at: defaults of every stage.
        num_epochs: epochs of the whole run; those beyond stage K's are trained with all written steps removed.
        overrides: settings of single stages, by stage; those of stage 0 hold for the single stage of cot too, and not
            for that of other methods.
        steps_per_stage: optimizer steps of each stage, in the place of epochs.
        patience, min_steps: defaults of every stage: validations without a gain that end it, and its least steps.
        start_stage: the first stage that is trained.
        icot_tokens, icot_smoothing: of the method icot.
    """

    def __init__(
        self,
        max_latent_stage: int,
        epochs_per_stage: int,
        c_thought: int = 2,
        *,
        method: str = "coconut",
        pad_latent_to_max: bool = False,
        learning_rate: float = 1e-5,
        warmup_steps: int = 0,
        uniform_prob: float = 0.0,
        advance_at: float | None = None,
        num_epochs: int | None = None,
        overrides: Mapping[int, Mapping[str, Any]] | None = None,
        start_stage: int = 0,
        icot_tokens: int = 8,
        icot_smoothing: float | None = 4.0,
        steps_per_stage: int | None = None,
        patience: int | None = None,
        min_steps: int = 0,
    ) -> None:
        for name, value, least in (
            ("max_latent_stage", max_latent_stage, 0),
            ("epochs_per_stage", epochs_per_stage, 1),
            ("c_thought", c_thought, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        self.is_staged = method in STAGED_METHODS
        self.has_own_settings = self.is_staged or method == "cot"  # which is stage 0, and nothing after it
        if not 0 <= start_stage <= (max_latent_stage if self.is_staged else 0):
            last = f"max_latent_stage, {max_latent_stage}" if self.is_staged else f"0, as {method} has a single stage"
            raise ConfigError(f"start_stage is {start_stage}; it must be from 0 to {last}")
        self.max_latent_stage = max_latent_stage
        self.epochs_per_stage = epochs_per_stage
        self.c_thought = c_thought
        self.method = method
        self.pad_latent_to_max = pad_latent_to_max
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.uniform_prob = uniform_prob
        self.advance_at = advance_at
        self.num_epochs = num_epochs
        self.overrides = dict(overrides or {})
        self.start_stage = start_stage
        self.icot_tokens = icot_tokens
        self.icot_smoothing = icot_smoothing
        self.steps_per_stage = steps_per_stage
        self.patience = patience
        self.min_steps = min_steps

    @classmethod
    def from_config(cls, config: Any) -> StageManager:
        """The curriculum that a run configuration describes."""
        names = ["epochs", "learning_rate", "warmup_steps", "uniform_prob", "advance_at", "steps", "patience"]
        names += ["min_steps", "c_thought"]
        overrides = {
            # A stage with epochs of its own is not counted in steps.
            stage: {n: config.stage_setting(stage, n) for n in names if n in own or (n == "steps" and "epochs" in own)}
            for stage, own in config.stages.items()
        }
        return cls(
            config.max_latent_stage,
            config.epochs_per_stage,
            config.c_thought,
            method=config.method,
            pad_latent_to_max=config.pad_latent_to_max,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            uniform_prob=config.uniform_prob,
            advance_at=config.advance_at,
            num_epochs=config.num_epochs,
            overrides=overrides,
            start_stage=config.start_stage,
            icot_tokens=config.icot_tokens,
            icot_smoothing=config.icot_smoothing,
            steps_per_stage=config.steps_per_stage,
            patience=config.early_stopping_patience,
            min_steps=config.early_stopping_min_steps,
        )

    @property
    def stages(self) -> list[int]:
        """The stages of this run, in order."""
        if not self.is_staged:
            return [0]
        trained = list(range(self.start_stage, self.max_latent_stage + 1))
        planned = [self.settings(stage).epochs for stage in trained]
        if self.num_epochs is not None and None not in planned and self.num_epochs > sum(e for e in planned if e):
            trained.append(self.max_latent_stage + 1)
        return trained

    def get_current_stage(self, epoch: int) -> int:
        """Stage of an epoch (counted from 0): 0 is written reasoning; capped at ``max_latent_stage``."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; epochs count from 0")
        if not self.is_staged:
            return 0
        return min(self.start_stage + epoch // self.epochs_per_stage, self.max_latent_stage)

    def settings(self, stage: int) -> StageSettings:
        """Training settings of a stage: the run's defaults, then those of ``stages:`` in the configuration."""
        epochs: int | None = self.epochs_per_stage
        if not self.is_staged and self.num_epochs is not None:
            epochs = self.num_epochs
        elif stage > self.max_latent_stage and self.num_epochs is not None:
            before = range(self.start_stage, self.max_latent_stage + 1)
            epochs = self.num_epochs - sum(self.settings(s).epochs or 0 for s in before)
        values: dict[str, Any] = {
            "epochs": epochs,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "uniform_prob": self.uniform_prob,
            "advance_at": self.advance_at,
            "steps": self.steps_per_stage,
            "patience": self.patience,
            "min_steps": self.min_steps,
        }
        if self.has_own_settings:
            own = dict(self.overrides.get(min(stage, self.max_latent_stage), {}))
            own.pop("c_thought", None)  # what a stage does to the text is its spec
            if stage > self.max_latent_stage:  # trained as stage K is, for the epochs that are left
                own.pop("epochs", None)
            values |= own
        if values["steps"] is not None:
            values["epochs"] = None
        return StageSettings(stage=stage, **values)

    def spec(self, stage: int) -> StageSpec:
        """What a stage does to a sample's text."""
        own = self.overrides.get(min(stage, self.max_latent_stage), {}) if self.is_staged else {}
        return stage_spec(
            stage,
            method=self.method,
            c_thought=own.get("c_thought", self.c_thought),
            max_latent_stage=self.max_latent_stage,
            pad_latent_to_max=self.pad_latent_to_max,
            icot_tokens=self.icot_tokens,
        )

    def get_stage_config(self, stage: int) -> dict[str, Any]:
        """A stage as a dictionary: stage, n_skip_steps, n_latents, c_thought, learning_rate, epochs."""
        spec, settings = self.spec(stage), self.settings(stage)
        return {
            "stage": stage,
            "n_skip_steps": spec.n_skip_steps,
            "n_latents": spec.n_latents,
            "c_thought": spec.c_thought,
            "learning_rate": settings.learning_rate,
            "epochs": settings.epochs,
        }

    def prepare_stage_data(self, dataset: Any, stage: int) -> Dataset[dict[str, Any]]:
        """A lazy view of `dataset` at `stage`, map-style or iterable as `dataset` is.

        Args:
            dataset: items as `MultimodalDataset` gives them, with its ``tokenizer`` and ``encoder``.
        """
        to_stage = partial(dataset.encoder.with_stage, spec=self.spec(stage), ids=special_token_ids(dataset.tokenizer))
        # torch gives an IterableDataset a __getitem__ too, which only raises.
        is_map = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
        return _MapView(dataset, to_stage) if is_map else _IterableView(dataset, to_stage)

    def spec_of_sample(self, key: str, n_steps: int, stage: int, *, seed: int, epoch: int) -> StageSpec:
        """How one sample is trained: stages are mixed (`uniform_prob`), and icot's removals smoothed."""
        drawn = mixed_stage(
            key,
            stage=stage,
            uniform_prob=self.settings(stage).uniform_prob if self.is_staged else 0.0,
            max_latent_stage=self.max_latent_stage,
            n_steps=n_steps,
            seed=seed,
            epoch=epoch,
        )
        spec = self.spec(drawn)
        if self.method == "icot":
            more = smoothed_removal(key, rate=self.icot_smoothing, seed=seed, epoch=epoch)
            spec = replace(spec, n_skip_tokens=spec.n_skip_tokens + more)
        return spec


class _MapView(Dataset[dict[str, Any]]):
    def __init__(self, dataset: Any, to_stage: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.dataset, self.to_stage = dataset, to_stage

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.to_stage(self.dataset[index])


class _IterableView(IterableDataset[dict[str, Any]]):
    def __init__(self, dataset: Any, to_stage: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.dataset, self.to_stage = dataset, to_stage

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.to_stage, self.dataset)
