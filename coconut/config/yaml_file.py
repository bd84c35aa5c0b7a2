"""Reads one YAML file: typed scalars, ``${VAR}`` from the environment, and the line of every key.

text -> nodes (duplicate keys, ${VAR}) -> plain values + {"stages.0.epochs": "args/demo.yaml:12"} + faults
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from coconut.config.faults import Fault
from coconut.types import ConfigError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^}]*))?\}")
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that also takes ``1e-5`` for the number it is."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_value(text: str) -> Any:
    """One value as YAML would read it.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str], list[Fault]]:
    """Reads a mapping.

    Returns:
        Its values, where each (dotted) key stands, and the faults that leave a key without a value.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    text = _text(path)
    reader = _Reader(path)
    try:
        values = reader.read(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: is not YAML: {error.problem or error.context}. "
            "Write `key: value` lines, indented with spaces, and put text with `: ` or `#` in quotes"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-13-45 looks like a date, and is none
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply to be a configuration") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines, but holds {_kind(values)}")
    return {str(key): value for key, value in values.items()}, reader.places, reader.faults


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, str] = {}
        self.faults: list[Fault] = []
        self._seen: set[int] = set()

    def read(self, text: str) -> Any:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return {}
            self._visit(loader, node, "")
            return loader.construct_document(node)
        finally:
            loader.dispose()

    def _visit(self, loader: _Loader, node: yaml.Node, key: str) -> None:
        if id(node) in self._seen:  # an alias
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            self._substitute(loader, node, key)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._visit(loader, item, key)
        elif isinstance(node, yaml.MappingNode):
            self._visit_mapping(loader, node, key)

    def _visit_mapping(self, loader: _Loader, node: yaml.MappingNode, key: str) -> None:
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            self._visit(loader, key_node, key)
            name = str(key_node.value)
            child = f"{key}.{name}" if key else name
            line = key_node.start_mark.line + 1
            if name in lines and name != "<<":
                self.faults.append(
                    Fault(child, f"{child}: is set twice, in lines {lines[name]} and {line}; remove one")
                )
            lines[name] = line
            self.places[child] = f"{self.path}:{line}"
            self._visit(loader, value_node, child)

    def _substitute(self, loader: _Loader, node: yaml.ScalarNode, key: str) -> None:
        if "${" not in node.value:
            return
        unset = [name for name, default in _VARIABLE.findall(node.value) if name not in os.environ]
        text = _VARIABLE.sub(_value_of, node.value)
        if missing := [match[1] for match in _VARIABLE.finditer(node.value) if match[2] is None and match[1] in unset]:
            names = " and ".join(f"${{{name}}}" for name in dict.fromkeys(missing))
            fix = f"export it, or give a default: ${{{missing[0]}:default}}"
            self.faults.append(Fault(key, f"{key}: {names} is not set in the environment; {fix}"))
        elif "${" in _VARIABLE.sub("", node.value):
            self.faults.append(Fault(key, f"{key} = {node.value!r}: write ${{NAME}} or ${{NAME:default}}"))
        node.value = text
        if node.style is None:  # unquoted: what was put in may be a number, true, or nothing
            node.tag = loader.resolve(yaml.ScalarNode, text, (True, False))


def _value_of(match: re.Match[str]) -> str:
    return os.environ.get(match[1], match[2] or "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = _neighbours(path)
        raise ConfigError(f"{path}: no such configuration file{near}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give one of its files{_neighbours(path / 'x')}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8 (byte {error.start}); is it a YAML file?") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _neighbours(path: Path) -> str:
    names = ", ".join(str(file) for file in sorted(path.parent.glob("[!.]*.yaml")))
    return f"; there are {names}" if names else ""


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r}"
