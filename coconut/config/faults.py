"""What can be wrong with a configuration, said in one sentence each: the value, the choices, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from coconut.config.schema import Schema, StageSettings
from coconut.types import ConfigError

#: Names that other trainers use for our keys, too unlike ours for a spell checker.
_ELSEWHERE = {
    "lr": "learning_rate",
    "batch_size": "batch_size_training",
    "epochs": "num_epochs",
    "train_path": "train_data_path",
    "val_path": "val_data_path",
    "test_path": "test_data_path",
    "model_name_or_path": "model_id",
    "output_dir": "save_path",
    "ds_config": "deepspeed",
    "no_thoughts": "method",
}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and with which key (dotted inside ``stages``); an empty key means the whole file."""

    key: str
    text: str


@dataclass(frozen=True)
class Note:
    """Something the log should say about the configuration, as long as ``key`` still has ``value``."""

    text: str
    key: str | None = None
    value: Any = None


def raise_faults(faults: Iterable[Fault], origins: Mapping[str, str] | None = None) -> None:
    """Raises one ConfigError that lists all faults, each after the place where its key was set."""
    lines = []
    for fault in dict.fromkeys(faults):
        origin = _origin(fault.key, origins or {})
        lines.append(f"{origin}: {fault.text}" if origin else fault.text)
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        raise ConfigError("\n  ".join([f"{len(lines)} faults in the configuration:", *lines]))


def unknown_key(key: str, value: Any) -> Fault:
    """The fault of a key that the schema does not have, with the nearest one that it has."""
    *parents, leaf = key.split(".")
    names = list(StageSettings.__annotations__) if parents else list(Schema.model_fields)
    nearest = _ELSEWHERE.get(leaf) if not parents else None
    if nearest is None:
        nearest = next(iter(difflib.get_close_matches(leaf, names, n=1, cutoff=0.5)), None)
    if nearest is not None:
        hint = f"did you mean {'.'.join([*parents, nearest])}?"
    else:
        hint = f"known are {', '.join(sorted(names))}" if parents else "docs/configuration.md lists all"
    return Fault(key, f"{key} = {value!r}: unknown key; {hint}")


def schema_faults(error: ValidationError) -> list[Fault]:
    """Pydantic's findings in our words."""
    return [_schema_fault(dict(found)) for found in error.errors(include_url=False)]


def nearest_choice(value: Any, choices: Iterable[str]) -> str:
    """``; nearest: x`` where a choice resembles the value, else nothing."""
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _schema_fault(found: dict[str, Any]) -> Fault:
    location = [part for part in found["loc"] if part != "[key]"]
    key = ".".join(map(str, location))
    value = found["input"]
    if found["type"] == "extra_forbidden":
        return unknown_key(key, value)
    if location[0] == "stages" and len(location) == 2 and "[key]" in found["loc"]:
        return Fault(key, f"{key}: a stage's number must be 0, 1, 2 ..., or `last`")
    field = Schema.model_fields[str(location[0])]
    is_stage = location[0] == "stages" and len(location) > 1
    description = _stage_description(str(location[-1])) if is_stage else field.description
    default = f"; default {_yaml(field.get_default(call_default_factory=True))}" if len(location) == 1 else ""
    return Fault(key, f"{key} = {value!r}: {_demand(found, field)} ({description}{default})")


def _demand(found: dict[str, Any], field: FieldInfo) -> str:
    """What the value must be, from the kind of pydantic's error."""
    context = found.get("ctx", {})
    kind = found["type"]
    bounds = {
        "greater_than_equal": ("ge", "at least"),
        "greater_than": ("gt", "more than"),
        "less_than_equal": ("le", "at most"),
        "less_than": ("lt", "less than"),
    }
    if kind in bounds:
        name, words = bounds[kind]
        return f"must be {words} {context[name]:g}"
    if kind == "literal_error":
        choices = [str(choice) for choice in _choices(field.annotation)]
        return f"must be one of {', '.join(choices)}{nearest_choice(found['input'], choices)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "finite_number":
        return "must be a finite number"
    if kind.startswith("int"):
        return "must be a whole number"
    if kind.startswith("float"):
        return "must be a number"
    if kind.startswith("bool"):
        return "must be true or false"
    if kind.startswith("string"):
        return "must be text; put it in quotes if it is meant as text"
    if kind.startswith("list"):
        return "must be a list such as [one, two]"
    if kind == "too_short":
        return "must not be empty"
    if kind.startswith("dict"):
        return "must be a table such as {learning_rate: 1e-4, epochs: 3}"
    return str(found["msg"])


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Those of a Literal, also inside a list."""
    args = get_args(annotation)
    return args if get_origin(annotation) is Literal else tuple(chain.from_iterable(_choices(part) for part in args))


def _stage_description(name: str) -> str:
    for item in getattr(get_type_hints(StageSettings, include_extras=True).get(name), "__metadata__", ()):
        if isinstance(item, FieldInfo) and item.description:
            return item.description
    return "settings of one stage"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _origin(key: str, origins: Mapping[str, str]) -> str | None:
    """Where a key was set; of a key inside ``stages``, the nearest parent that is known."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if origin := origins.get(".".join(parts[:length])):
            return origin
    return origins.get("")
