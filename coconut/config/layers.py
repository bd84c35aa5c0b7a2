"""How layers of settings combine: base file -> file -> command line -> assignment. The later layer wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coconut.config.faults import Fault, Note

#: Keys a stage may set for itself, and the run's key of the same meaning.
STAGE_KEYS = {
    "learning_rate": "learning_rate",
    "epochs": "epochs_per_stage",
    "uniform_prob": "uniform_prob",
    "warmup_steps": "warmup_steps",
    "advance_at": "advance_at",
    "train_data_path": "train_data_path",
    "steps": "steps_per_stage",
    "patience": "early_stopping_patience",
    "min_steps": "early_stopping_min_steps",
    "c_thought": "c_thought",
    "batch_size_training": "batch_size_training",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "global_batch_size": "global_batch_size",
}


def overlay(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> tuple[dict[str, Any], list[Note]]:
    """Lays one layer over another.

    ``stages`` is merged key by key. Where the upper layer sets a run's key, the lower layer's settings of single stages
    under that name go: ``learning_rate=5e-6`` on the command line must not be undone by a stage of the file below it.

    Returns:
        The combined layer, and notes for the log.
    """
    merged = {**lower, **upper}
    notes: list[Note] = []
    stages = _tables(lower.get("stages"))
    # Epochs and steps say the same thing: a run's key of either kind replaces both.
    for name, key in (*STAGE_KEYS.items(), ("epochs", "steps_per_stage"), ("steps", "epochs_per_stage")):
        if key not in upper:
            continue
        holders = [stage for stage, table in stages.items() if table.pop(name, upper[key]) != upper[key]]
        if holders:
            notes.append(Note(f"{key} also replaces what lower layers set for stages {_names(holders)}"))
    own = upper.get("stages", {})
    if own is None:  # `stages:` with nothing after it takes the inherited ones away
        stages = {}
    if own is None or isinstance(own, Mapping):
        for stage, table in _tables(own).items():
            stages[stage] = {**stages.get(stage, {}), **table}
        odd = {_number(key): value for key, value in (own or {}).items() if not _is_table(value)}
        merged["stages"] = {stage: table for stage, table in stages.items() if table} | odd
        if not merged["stages"]:
            del merged["stages"]
    return merged, notes


def resolve_last(stages: Any, max_latent_stage: Any) -> tuple[Any, list[Fault]]:
    """Moves what is written under ``last`` to stage K; it is a fault when stage K says otherwise under its number."""
    if not isinstance(stages, Mapping) or not isinstance(max_latent_stage, int):
        return stages, []
    last, own = stages.get("last", {}), stages.get(max_latent_stage, {})
    if "last" not in stages or not _is_table(last) or not _is_table(own):
        return stages, []
    faults = [
        Fault(
            f"stages.last.{name}",
            f"stages.last.{name} = {last[name]!r} contradicts stages.{max_latent_stage}.{name} = {own[name]!r}: "
            f"the last stage is max_latent_stage = {max_latent_stage}; keep one of them",
        )
        for name in last.keys() & own.keys()
        if last[name] != own[name]
    ]
    numbered = {key: value for key, value in stages.items() if key != "last"}
    return {**numbered, max_latent_stage: {**last, **own}}, faults


def _tables(stages: Any) -> dict[Any, dict[str, Any]]:
    if not isinstance(stages, Mapping):
        return {}
    return {_number(key): dict(value or {}) for key, value in stages.items() if _is_table(value)}


def _is_table(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


def _number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _names(stages: list[Any]) -> str:
    return ", ".join(str(stage) for stage in sorted(stages, key=str))
