"""Every configuration key is documented as the schema has it, and read by code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from coconut.config import Config
from coconut.config.reference import key_references, markdown, stage_references
from coconut.config.schema import Schema, StageSettings
from coconut.data import ImageProcessor
from coconut.training.batches import BATCH_KEYS, stage_batch
from launch import docs

#: Numbers that neither count nor measure anything.
PLAIN_NUMBERS = {"seed", "icot_smoothing", "learning_rate", "weight_decay", "max_grad_norm"}
PLAIN_NUMBERS |= {"lora_rank", "lora_alpha", "early_stopping_min_delta"}

#: What defines, checks or describes keys: to appear there is not to be used.
NOT_READING = ("schema", "checks", "faults", "reference", "templates", "old_keys", "layers")


def rows() -> list:
    return [row for section in key_references().values() for row in section]


def test_the_document_is_what_the_schema_says(project: Path) -> None:
    written = (project / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == markdown(), "run python launch/docs.py"


def test_the_command_writes_and_checks(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "DOCUMENT", tmp_path / "configuration.md")
    assert docs.main(["--check"]) == 1
    assert "run python launch/docs.py" in capsys.readouterr().err
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    docs.DOCUMENT.write_text(markdown().replace("optimizer steps", "steps"))
    assert docs.main(["--check"]) == 1


def test_every_key_has_a_line_with_default_and_help() -> None:
    assert [row.name for row in rows()] == list(Schema.model_fields)
    assert {row.name for row in stage_references()} == set(StageSettings.__annotations__)
    for row in [*rows(), *stage_references()]:
        assert row.help and row.default and row.type, row.name
    assert list(key_references())[:3] == ["Run", "Model", "Curriculum"]


def test_every_number_has_a_unit_or_is_known_to_have_none() -> None:
    numbers = [row for row in [*rows(), *stage_references()] if row.type.startswith(("number", "whole number"))]
    assert {row.name for row in numbers if not row.unit} <= PLAIN_NUMBERS


@pytest.mark.parametrize(
    ("name", "kind", "bounds", "unit", "default"),
    [
        ("seed", "whole number", "≥ 0, < 2^63", "", "42"),
        ("num_epochs", "whole number or null", "≥ 1", "epochs", "40"),
        ("hang_timeout_s", "number or null", "> 0", "seconds", "1800.0"),
        ("bf16", "true or false", "", "", "false"),
        ("balance", "one of `none`, `count`, `cost`", "", "", "count"),
        ("stages", "table of whole number → table of settings", "", "", "{}"),
    ],
)
def test_a_line_says_what_the_schema_says(name: str, kind: str, bounds: str, unit: str, default: str) -> None:
    row = next(row for row in rows() if row.name == name)
    assert (row.type, row.range, row.unit, row.default) == (kind, bounds, unit, default)


def is_config(node: ast.expr) -> bool:
    """``config``, ``self.config``, ``preview.config`` ..., and a configuration's own values while it is made."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in ("config", "resolved")


def keys_read(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Keys taken from a configuration: config.key, getattr(config, "key"), config.get("key"), f(config, "key")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            yield node.attr
        if isinstance(node, ast.Call):
            is_method = isinstance(node.func, ast.Attribute) and node.func.attr == "get" and is_config(node.func.value)
            if is_method or any(is_config(argument) for argument in node.args):
                texts = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
                yield from (text for text in texts if text in known)


def stage_keys_read(tree: ast.AST) -> Iterator[str]:
    """Keys of a stage: of what StageManager.settings gives, and asked for by name: config.stage_setting(k, "key")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value = node.value.func if isinstance(node.value, ast.Call) else node.value
            name = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""
            if name == "settings":
                yield node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "stage_setting":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def trees(project: Path, *folders: str) -> Iterator[ast.AST]:
    for folder in folders:
        for file in sorted((project / folder).rglob("*.py")):
            if not (file.parent.name == "config" and file.stem in NOT_READING):
                yield ast.parse(file.read_text(encoding="utf-8"))


def test_every_key_is_read_by_code(project: Path) -> None:
    """No option that nothing reads. A list of names, such as that of the settings a run must keep, reads none."""
    known = set(Schema.model_fields)
    read = {key for tree in trees(project, "coconut", "launch") for key in keys_read(tree, known)}
    settings = {"image_size": 28, "max_num_patches": 3, "use_thumbnail": False, "dynamic_preprocess": False}
    processor = ImageProcessor.from_config(Config(settings))  # reads its settings by their names
    read |= {name for name, value in settings.items() if getattr(processor, name) == value}
    read |= {"stages"} if Config({"stages": {1: {"epochs": 9}}}).stage_setting(1, "epochs") == 9 else set()
    assert known - read == set()


def test_every_key_of_a_stage_is_read_by_code(project: Path) -> None:
    read = {key for tree in trees(project, "coconut/training") for key in stage_keys_read(tree)}
    for key in BATCH_KEYS:  # read by their names
        read |= {key} if getattr(stage_batch(Config({"stages": {1: {key: 9}}}), 1), key) == 9 else set()
    assert set(StageSettings.__annotations__) - read == set()


def test_a_key_that_is_only_named_does_not_count() -> None:
    tree = ast.parse('NAMES = ("seed", "bf16")\nother.seed\nconfig.bf16\nf(config, "name")\ng("debug")')
    assert set(keys_read(tree, {"seed", "bf16", "name", "debug"})) == {"bf16", "name"}
