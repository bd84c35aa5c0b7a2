"""The documentation: the site builds without a dead link, and what the pages say of the code is true."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.api.test_signatures import DOCUMENTED

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))


def find(path: str) -> Any:
    """What a dotted path names."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def test_the_page_of_the_interface_names_all_of_the_api_document() -> None:
    paths = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    shown = [find(path) for path in paths]
    assert all((thing.__doc__ or "").strip() for thing in shown)
    for place in DOCUMENTED:
        module, _, name = place.partition(":")
        assert getattr(import_module(module), name.partition(".")[0]) in shown, f"{place} is not in docs/api.md"


@pytest.fixture(scope="module")
def source() -> str:
    """All code, with strings that go on over several lines joined."""
    files = [*(ROOT / "coconut").rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_error_of_the_troubleshooting_page_is_one_that_the_code_prints(source: str) -> None:
    quoted = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 15
    for message in quoted:
        pieces = [piece.strip(" :;?,.()") for part in message.split("...") for piece in re.split(r"[;,] ", part)]
        missing = [piece for piece in pieces if piece not in source]
        assert max(map(len, pieces)) >= 12 and not missing, f"nothing prints {missing} of {message!r}"


def test_the_page_on_the_loop_names_what_is_there() -> None:
    named = re.findall(r"^- `(coconut/\S+)\.py`, `(\w+)`", (DOCS / "how_it_works.md").read_text(), re.MULTILINE)
    assert len(named) >= 4
    for module, name in named:
        assert hasattr(import_module(module.replace("/", ".")), name), (module, name)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_was_executed_without_an_error_and_uses_what_is_there(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    for cell in cells:
        code = "".join(cell["source"])
        for launched in re.findall(r"launch/\w+\.(?:py|sh)", code):
            assert (ROOT / launched).is_file(), launched
        python = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("!", "2>", "--")))
        for node in ast.walk(ast.parse(python)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("coconut"):
                module = import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


@pytest.mark.slow
def test_the_site_builds_without_a_dead_link_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install 'multimodal-coconut[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = list(tmp_path.rglob("index.html"))
    assert len(pages) >= 15
    for page in pages:
        fetched = re.findall(r'<(?:script|img)[^>]* src="(https?:[^"]+)"', page.read_text())
        fetched += re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="(https?:[^"]+)"', page.read_text())
        assert not fetched, (page, fetched)
    assert "tokenize_multimodal_sample" in (tmp_path / "api" / "index.html").read_text()
