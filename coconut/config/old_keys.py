"""Keys of older configuration files, each translated into the key that stands for it today."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coconut.config.faults import Fault, Note
from coconut.config.schema import METHODS

ZERO1_PATH = "ds_configs/zero1.json"
ZERO3_PATH = "ds_configs/zero3.json"

#: Older names of keys that are still there.
RENAMED = {"gradient_clip_norm": "max_grad_norm", "eval_data_path": "test_data_path"}
_ENGINES = {"use_fsdp": ZERO3_PATH, "use_ddp": ZERO1_PATH}
_ENGINE_NOTES = {
    "use_fsdp": f"use_fsdp: true means ZeRO stage 3 here: deepspeed = {ZERO3_PATH}",
    "use_ddp": f"use_ddp: true means ZeRO stage 1 here, every rank holding all weights: deepspeed = {ZERO1_PATH}",
}

#: How each older key reads on today's values.
OLD_READS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "cot": lambda values: values["method"] == "cot",
    "no_cot": lambda values: values["method"] == "no_cot",
    "coconut": lambda values: values["method"] == "coconut",
    "use_fsdp": lambda values: values["deepspeed"] == ZERO3_PATH,
    "use_ddp": lambda values: values["deepspeed"] == ZERO1_PATH,
    "gradient_clip_norm": lambda values: values["max_grad_norm"],
    "eval_data_path": lambda values: values["test_data_path"],
}


def translate(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Note], list[Fault]]:
    """Rewrites one layer (one file, one command line) into today's keys.

    Returns:
        The layer, notes for the log, and the faults: contradictions inside this layer.
    """
    values = dict(given)
    notes: list[Note] = []
    faults: list[Fault] = []
    for old, new in RENAMED.items():
        if old in values:
            value = values.pop(old)
            _set(values, new, value, f"{old} = {value!r}", faults, old)
    for flag in METHODS:
        if _flag(values, flag, faults):
            _set(values, "method", flag, f"{flag} = True", faults, flag)
    for flag, path in _ENGINES.items():
        if _flag(values, flag, faults):
            notes.append(Note(_ENGINE_NOTES[flag], "deepspeed", path))
            _set(values, "deepspeed", path, f"{flag} = True (meaning deepspeed = {path!r})", faults, flag)
    return values, notes, faults


def _flag(values: dict[str, Any], flag: str, faults: list[Fault]) -> bool:
    """Takes an older flag out of the layer; a flag that is false says nothing."""
    value = values.pop(flag, False)
    if value not in (True, False):  # 0 and 1 are in there too
        faults.append(Fault(flag, f"{flag} = {value!r}: must be true or false"))
        return False
    return bool(value)


def _set(values: dict[str, Any], key: str, value: Any, said: str, faults: list[Fault], old: str) -> None:
    if key in values and values[key] != value:
        faults.append(Fault(old, f"{said} contradicts {key} = {values[key]!r}: keep one of them, best {key}"))
    else:
        values[key] = value
