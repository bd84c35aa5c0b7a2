"""From files, overrides and templates to a checked Config.

base_config's file -> file -> overrides of the command line     (the later wins)
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from coconut.config.checks import missing_paths
from coconut.config.config import Config
from coconut.config.faults import Fault, nearest_choice, raise_faults
from coconut.config.old_keys import RENAMED
from coconut.config.schema import Schema
from coconut.config.templates import TEMPLATES
from coconut.config.yaml_file import parse_value, read_yaml
from coconut.types import ConfigError

Layer = tuple[dict[str, Any], dict[str, str]]


def load_config(config_path: str | Path, validate: bool = True, overrides: Sequence[str] = ()) -> Config:
    """Loads a YAML file, the files it inherits from (``base_config: other.yaml``), and overrides.

    Args:
        config_path: the YAML file.
        validate: check everything, the existence of data paths included; without it, only parse and substitute.
        overrides: ``key=value`` texts that win over the files; ``stages.0.learning_rate=1e-3`` reaches inside.

    Raises:
        ConfigError: listing every fault with the file and line of its key.
    """
    faults: list[Fault] = []
    layers = _read_chain(Path(config_path), [], faults)
    typed = parse_overrides(overrides)
    layers.append((typed, dict.fromkeys(_dotted(typed), "command line")))
    broken = {_top(fault.key) for fault in faults}
    config = Config.from_layers([(_without(layer, broken), places) for layer, places in layers], validate=False)
    origins = config.origins | {key: place for _, places in layers for key, place in places.items() if key in broken}
    if validate:
        faults += _faults(config, broken)
    raise_faults(faults, origins)
    return config


def validate_config(config: Config) -> None:
    """Checks values, contradictions between keys, and that the paths a run needs exist.

    Raises:
        ConfigError: listing every fault.
    """
    raise_faults(_faults(config), config.origins)


def create_config_from_template(template_name: str, **overrides: Any) -> Config:
    """A configuration that starts from a template; data paths stay unset.

    Args:
        template_name: default, cot, coconut, eval or debug.
        **overrides: values that win over the template's.

    Raises:
        ConfigError: there is no such template, or an override is unusable.
    """
    if template_name not in TEMPLATES:
        choices = ", ".join(TEMPLATES)
        hint = nearest_choice(template_name, TEMPLATES)
        raise ConfigError(f"template_name = {template_name!r}: must be one of {choices}{hint}")
    return Config.from_layers([(TEMPLATES[template_name], {}), (overrides, {})])


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Reads ``key=value`` texts as the command line gives them; values are typed as in YAML.

    Whether the keys exist and the values fit is judged later, together with the file they override.

    Raises:
        ConfigError: a text is not of the form ``key=value``.
    """
    faults: list[Fault] = []
    values: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        key = key.strip()
        if not separator or not key or key.startswith("-"):
            fix = f"write {key.lstrip('-') or 'key'}={value or 'value'}"
            faults.append(Fault("", f"command line: {text!r} is not of the form key=value; {fix}"))
            continue
        try:
            _place(values, key.split("."), _typed(key, value))
        except (yaml.YAMLError, ValueError, RecursionError):
            faults.append(
                Fault("", f"command line: {text!r}: the value is not YAML; quote it, or balance its brackets")
            )
    raise_faults(faults)
    return values


def _faults(config: Config, broken: Set[str] = frozenset()) -> list[Fault]:
    """What is wrong with values and paths; nothing on the path of a key whose value is wrong or could not be read."""
    faulty = broken | {_top(fault.key) for fault in config.faults}
    return [*config.faults, *(fault for fault in missing_paths(config.sound) if _top(fault.key) not in faulty)]


def _read_chain(path: Path, above: list[Path], faults: list[Fault]) -> list[Layer]:
    """The layers of a file and of those it inherits from, the base first."""
    here = path.resolve()
    if here in above:
        names = " -> ".join(file.name for file in [*above[above.index(here) :], here])
        raise ConfigError(f"{path}: base_config goes in a circle: {names}")
    values, places, found = read_yaml(path)
    faults += found
    base = values.pop("base_config", None)
    place = places.get("base_config", str(path))
    if base is None:
        return [(values, places)]
    if not isinstance(base, str):
        raise ConfigError(f"{place}: base_config = {base!r}: must be the path of one YAML file, relative to this one")
    base_path = path.parent / Path(base).expanduser()
    if not base_path.is_file():
        raise ConfigError(f"{place}: base_config = {base!r}: no such file as {base_path}")
    return [*_read_chain(base_path, [*above, here], faults), (values, places)]


def _typed(key: str, text: str) -> Any:
    """The value of an override: kept as text where the key takes text, else read as YAML; so is a table."""
    field = Schema.model_fields.get(RENAMED.get(key, key))
    kinds = _kinds(field.annotation) if field else set()
    if str not in kinds or (dict in kinds and text.lstrip().startswith("{")):
        return parse_value(text)
    if types.NoneType in kinds and text.strip().lower() in ("null", "none", "~"):
        return None
    return text.strip()


def _kinds(annotation: Any) -> set[Any]:
    """The plain types an annotation admits; the choices of a Literal count as text."""
    origin = get_origin(annotation)
    if origin is Literal:
        return {str}
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(_kinds(part) for part in get_args(annotation)))
    if origin is dict:
        return {dict}
    return {annotation}


def _place(values: dict[str, Any], path: list[str], value: Any) -> None:
    *parents, leaf = path
    for part in parents:
        table = values.setdefault(_number(part), {})
        if not isinstance(table, dict):
            table = values[_number(part)] = {}
        values = table
    values[_number(leaf)] = value


def _number(part: str) -> Any:
    return int(part) if part.isdecimal() else part


def _dotted(values: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Every key, those of inner tables too, joined by dots."""
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys


def _top(key: str) -> str:
    return key.split(".")[0]


def _without(layer: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in layer.items() if key not in keys}
