"""The configuration object: keys as attributes, every change checked at once."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from coconut.config.checks import contradictions, observations
from coconut.config.faults import Fault, Note, raise_faults, schema_faults, unknown_key
from coconut.config.layers import STAGE_KEYS, overlay, resolve_last
from coconut.config.old_keys import OLD_READS, translate
from coconut.config.schema import Schema

if TYPE_CHECKING:
    _Keys = Schema  # editors and mypy know every key's type
else:
    _Keys = object

#: What ``debug: true`` sets, unless something else was set.
DEBUG_VALUES = {"log_level": "DEBUG", "max_train_samples": 32, "max_val_samples": 16}

_DEFAULTS = Schema().model_dump()


@dataclass(frozen=True)
class _State:
    given: dict[str, Any] = field(default_factory=dict)  # what somebody set, in today's keys
    values: dict[str, Any] = field(default_factory=dict)  # every key; checked, unless there are faults
    sound: dict[str, Any] = field(default_factory=dict)  # every key, with the default in place of a faulty value
    faults: tuple[Fault, ...] = ()
    notes: tuple[Note, ...] = ()  # of the layers; what the values themselves tell is derived
    origins: dict[str, str] = field(default_factory=dict)  # key -> "args/demo.yaml:12"


class Config(_Keys):
    """Settings of a run: ``config.learning_rate``, with every key of the schema present.

    Assignment and ``update`` are checked at once and change nothing when they fail. Two keys that depend on each other
    are changed together, by one ``update``.

    Args:
        config_dict: settings that differ from the defaults; older keys are translated.
        validate: check them; without it the values are kept as they are, unknown keys too.

    Raises:
        ConfigError: listing everything that is wrong.
    """

    _state: _State

    def __init__(self, config_dict: Mapping[str, Any] | None = None, *, validate: bool = True) -> None:
        self._build([(config_dict or {}, {})], validate)

    @classmethod
    def from_layers(
        cls, layers: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]], *, validate: bool = True
    ) -> Config:
        """Combines layers of settings, the later one winning.

        Args:
            layers: settings, and where each key was set (``key -> "args/demo.yaml:12"``).
            validate: check the result.
        """
        config = cls.__new__(cls)
        config._build(layers, validate)
        return config

    def _build(self, layers: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]], validate: bool) -> None:
        state = _State()
        for layer, places in layers:
            state = _add(state, layer, places)
        self._settle(state, validate)

    def _settle(self, state: _State, validate: bool = True) -> None:
        checked = _check(state)
        if validate:
            raise_faults(checked.faults, checked.origins)
        object.__setattr__(self, "_state", checked)

    # -- reading --

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        values = self._state.values
        if name in values:
            return values[name]
        if name in OLD_READS:
            return OLD_READS[name](values)
        raise AttributeError(unknown_key(name, None).text.replace(" = None", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default where there is no such key."""
        return getattr(self, key) if self.has(key) else default

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return key in self._state.values or key in OLD_READS

    def to_dict(self) -> dict[str, Any]:
        """All keys with their values, as a copy of plain Python values."""
        return copy.deepcopy(self._state.values)

    @property
    def explicit(self) -> frozenset[str]:
        """The keys that somebody set: file, command line or assignment."""
        return frozenset(self._state.given)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the log should say once about these settings: translated older keys, settings without effect."""
        values = self._state.values
        notes = [note.text for note in self._state.notes if note.key is None or values[note.key] == note.value]
        if not self._state.faults:
            notes += [note.text for note in observations(values)]
        return tuple(dict.fromkeys(notes))

    @property
    def origins(self) -> dict[str, str]:
        """Where each key was set (``args/demo.yaml:12``, ``command line``), as far as that is known."""
        return dict(self._state.origins)

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What is wrong with these settings; always empty unless they were loaded with ``validate=False``."""
        return self._state.faults

    @property
    def sound(self) -> dict[str, Any]:
        """All keys, with the default in place of each value that is faulty."""
        return copy.deepcopy(self._state.sound)

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return Path(self.save_path) / self.name

    @property
    def dtype(self) -> str:
        """The name of the dtype that weights are computed in."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    def stage_setting(self, stage: int, name: str) -> Any:
        """A setting as it holds in one stage: the stage's own where it has one, else the run's.

        Args:
            stage: number of the stage.
            name: one of `STAGE_KEYS`.
        """
        own: Mapping[str, Any] = self.stages.get(stage, {})
        if name == "steps" and "epochs" in own and "steps" not in own:  # a stage of its own number of epochs
            return None
        return own[name] if name in own else getattr(self, STAGE_KEYS[name])

    # -- changing --

    def __setattr__(self, name: str, value: Any) -> None:
        self.update(**{name: value})

    def update(self, **kwargs: Any) -> None:
        """Sets several keys at once; checked together, and all or none are set."""
        before = self._state
        origins = {key: place for key, place in before.origins.items() if key.split(".")[0] not in kwargs}
        kept = replace(before, faults=(), origins=origins)
        if "stages" in kwargs:  # an assignment replaces the table, where a layer would add to it
            kept = replace(kept, given={key: value for key, value in kept.given.items() if key != "stages"})
        after = _check(_add(kept, kwargs, {}))
        # Settings loaded without validation may hold other faults: they are not this change's.
        raise_faults([fault for fault in after.faults if fault not in before.faults], origins)
        object.__setattr__(self, "_state", after)

    def merge(self, other_config: Config) -> Config:
        """A new configuration: these settings, overridden by those that somebody set in ``other_config``."""
        other = other_config._state
        both = _add(replace(self._state, faults=()), other.given, other.origins)
        merged = Config()
        merged._settle(replace(both, notes=(*both.notes, *other.notes)))
        return merged

    def save(self, path: str | Path) -> None:
        """Writes all keys to a YAML file that ``load_config`` reads back to the same settings."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        unfinished.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        unfinished.replace(target)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._state.values == other._state.values

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Config({self._state.given!r})"

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._state.values})


def _add(state: _State, layer: Mapping[str, Any], places: Mapping[str, str]) -> _State:
    """Lays one layer of settings over those there are."""
    translated, notes, faults = translate({str(key): value for key, value in layer.items()})
    given, overlay_notes = overlay(state.given, translated)
    return replace(
        state,
        given=given,
        faults=(*state.faults, *faults),
        notes=(*state.notes, *notes, *overlay_notes),
        origins={**state.origins, **places},
    )


def _check(state: _State) -> _State:
    """Gives every key its value and finds everything that is wrong."""
    resolved = dict(state.given)
    clashes: list[Fault] = []
    if "stages" in resolved:
        try:
            last = Schema.model_validate(
                {k: resolved[k] for k in ["max_latent_stage"] if k in resolved}
            ).max_latent_stage
            resolved["stages"], clashes = resolve_last(resolved["stages"], last)
        except ValidationError:  # that is the fault: which stage is the last is not known
            resolved["stages"], _ = resolve_last(resolved["stages"], _DEFAULTS["max_latent_stage"])
    if resolved.get("debug") is True:
        resolved = {**DEBUG_VALUES, **resolved}
    faults: list[Fault] = []
    try:
        values = Schema.model_validate(resolved).model_dump()
    except ValidationError as error:
        faults = schema_faults(error)
        faulty = _tops(faults)
        values = Schema.model_validate({k: v for k, v in resolved.items() if k not in faulty}).model_dump()
    faults += contradictions(values, _tops(faults))
    found = (*state.faults, *clashes, *faults)
    return replace(state, values=values | resolved if found else values, sound=values, faults=found)


def _tops(faults: Sequence[Fault]) -> set[str]:
    return {fault.key.split(".")[0] for fault in faults}
