"""The command line of make_shards: what it writes, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coconut.data.shards import ShardReader

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "make_shards.py"
GOOD = {"question": "q", "steps": ["s"], "answer": "a"}


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("make_shards", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_shards_are_written_and_verified(main, tmp_path, picture, capsys) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(8, 8))
    data = tmp_path / "data.json"
    data.write_text(json.dumps([GOOD | {"image": "a.png"}, GOOD]))
    arguments = [str(data), "--out", str(tmp_path / "out"), "--image-root", str(tmp_path / "pictures"), "--verify"]
    assert main(arguments) == 0
    assert "2 samples in 1 shards" in capsys.readouterr().out
    assert ShardReader(tmp_path / "out").read(0).images == (picture(8, 8),)
    assert main(["--out", str(tmp_path / "out"), "--verify"]) == 0
    assert "verified" in capsys.readouterr().out


def test_a_long_set_is_cut_by_size(main, tmp_path, capsys) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(GOOD) for _ in range(50)))
    assert main([str(data), "--out", str(tmp_path / "out"), "--shard-size", "0.02"]) == 0
    assert "50 samples in 3 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, "data.json does not exist"),
        ([], "zero samples"),
        ([GOOD, {"question": "q", "steps": []}], "data.json:1: field 'answer' is missing"),
        ([GOOD | {"image": "gone.png"}], "gone.png does not exist"),
        ([GOOD | {"image": "data.json"}], "not an image"),
    ],
)
def test_bad_input_is_one_line_and_code_2(main, tmp_path, capsys, records, message: str) -> None:
    data = tmp_path / "data.json"
    if records is not None:
        data.write_text(json.dumps(records))
    assert main([str(data), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_options(main, tmp_path, capsys) -> None:
    (tmp_path / "d.json").write_text(json.dumps([GOOD]))
    assert main([str(tmp_path / "d.json"), "--out", str(tmp_path / "o"), "--shard-size", "0"]) == 2
    assert "must be above 0" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--verify"]) == 2
    assert "holds no shards" in capsys.readouterr().err
    for arguments in (["--out", "x"], ["d.json"], ["--out", "x", "--verify", "--image-root", "y"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_help_comes_at_once_from_anywhere(tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - started < 2
    assert "--shard-size" in done.stdout


def test_the_script_finds_the_project_from_a_clone(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import runpy; runpy.run_path({str(SCRIPT)!r}); import coconut.types"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
