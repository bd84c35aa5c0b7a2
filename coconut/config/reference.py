"""The reference of all configuration keys as Markdown, out of the schema alone: `python launch/docs.py` writes it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from coconut.config.layers import STAGE_KEYS
from coconut.config.old_keys import OLD_READS, RENAMED
from coconut.config.schema import Schema, StageSettings, Unit

_HEAD = """# Configuration

Written by `python launch/docs.py` from `coconut/config/schema.py`; a test compares them. Change the schema, not this
file.

A file of `args/` holds such keys; any of them can be given on the command line too (`learning_rate=5e-6
stages.1.epochs=3`), which wins over the file, and that over its `base_config`. `${NAME:default}` in a file is replaced
from the environment. An unknown key, a value out of range and a contradiction between keys are errors that say what to
do. A number without a unit is a plain number. *null* means that the key has no value.
"""

_STAGES = """Under `stages.K` for stage K (`last` is stage `max_latent_stage`); a key that is left out follows the run's
key that is named as its default."""

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_BOUNDS = (("gt", "> {}"), ("ge", "≥ {}"), ("lt", "< {}"), ("le", "≤ {}"))


@dataclass(frozen=True)
class KeyReference:
    """One key, as it is documented."""

    name: str
    type: str
    range: str  # "" where every value of the type will do
    default: str
    unit: str  # "" where there is none
    help: str


def key_references() -> dict[str, list[KeyReference]]:
    """All keys of the schema, by the heading they stand under there."""
    sections: dict[str, list[KeyReference]] = {}
    heading = ""
    # Headings are comments: pydantic keeps none of them, and a second list of keys would drift from the schema's.
    for found in re.finditer(r"^    (?:# -- (\w+) --$|(\w+): )", inspect.getsource(Schema), re.MULTILINE):
        if found[1]:
            heading = found[1].capitalize()
        elif found[2] in Schema.model_fields:
            field = Schema.model_fields[found[2]]
            default = _yaml(field.get_default(call_default_factory=True))
            sections.setdefault(heading, []).append(
                _reference(found[2], field.annotation, field.metadata, default, field.description or "")
            )
    return sections


def stage_references() -> list[KeyReference]:
    """The keys of one entry of ``stages``."""
    rows = []
    for name, hint in get_type_hints(StageSettings, include_extras=True).items():
        field = next(part for part in hint.__metadata__ if isinstance(part, FieldInfo))
        metadata = [*hint.__metadata__, *field.metadata]
        default = f"`{STAGE_KEYS[name]}`"
        rows.append(_reference(name, hint.__origin__, metadata, default, field.description or ""))
    return rows


def markdown() -> str:
    """The whole document."""
    parts = [_HEAD]
    for heading, rows in key_references().items():
        parts.append(f"## {heading}\n\n{_table(rows)}")
    parts.append(f"## One stage\n\n{_STAGES}\n\n{_table(stage_references())}")
    renamed = ", ".join(f"`{old}` (`{new}`)" for old, new in RENAMED.items())
    flags = ", ".join(f"`{name}`" for name in OLD_READS if name not in RENAMED)
    parts.append(
        f"## Older names\n\nStill read: {renamed}; and as flags {flags}, each translated into `method` or\n"
        "`deepspeed`, which the log says.\n"
    )
    return "\n".join(parts)


def _reference(name: str, annotation: Any, metadata: list[Any], default: str, text: str) -> KeyReference:
    unit = next((part.name for part in _units(annotation, metadata)), "")
    return KeyReference(name, _type(annotation), _range(metadata), default, unit, text)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is type(None) else _type(part) for part in arguments)
    if origin is dict:
        return f"table of {_type(arguments[0])} → {_type(arguments[1])}"
    if origin is list:
        return f"list of {_type(arguments[0])}"
    return "table of settings" if is_typeddict(annotation) else _PLAIN[annotation]


def _range(metadata: list[Any]) -> str:
    """``≥ 0, < 2^63``, from the bounds that pydantic keeps."""
    texts = [
        words.format(_number(getattr(part, name)))
        for part in metadata
        for name, words in _BOUNDS
        if getattr(part, name, None) is not None and not isinstance(part, FieldInfo)
    ]
    return ", ".join(texts)


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def _units(annotation: Any, metadata: list[Any]) -> Iterator[Unit]:
    yield from (part for part in metadata if isinstance(part, Unit))
    if get_origin(annotation) is Annotated:
        yield from (part for part in annotation.__metadata__ if isinstance(part, Unit))
    for part in get_args(annotation):
        if get_origin(part) is Annotated:
            yield from _units(part, [])


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "{}" if value == {} else str(value)


def _table(rows: list[KeyReference]) -> str:
    lines = ["| key | type | range | unit | default | meaning |", "|---|---|---|---|---|---|"]
    for row in rows:
        default = row.default if row.default.startswith("`") else f"`{row.default}`"
        cells = (f"`{row.name}`", row.type, row.range, row.unit, default, row.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
