"""Files that would run code if they were unpickled, or loaded as code, in the places where a run reads files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from coconut.config import ConfigError, load_config
from coconut.model import MultimodalCoconut
from coconut.training.checkpoint import CheckpointFolder
from coconut.types import CheckpointError, CoconutError
from coconut.utils.tokenizer import load_tokenizer

# A hostile checkpoint: test_checkpoint.py.


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Appears when hostile code ran; shown to be able to."""
    path = tmp_path / "trace"
    pickle.loads(pickle.dumps(Hostile(path)))
    assert path.exists()
    path.unlink()
    return path


@pytest.fixture
def model(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "data" / "arrow_maze" / "model", tmp_path / "model"))


def test_yaml_cannot_call_python(tmp_path: Path, trace: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(f'name: !!python/object/apply:os.system ["touch {trace}"]\n')
    with pytest.raises(ConfigError):
        load_config(path, validate=False)
    assert not trace.exists()


def test_pickled_weights_do_not_run(model: Path, trace: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save(Hostile(trace), model / "pytorch_model.bin")
    with pytest.raises(Exception):  # noqa: B017, PT011 - transformers' own, of no fixed kind
        MultimodalCoconut.from_pretrained(model)
    assert not trace.exists()


def test_code_in_a_model_folder_does_not_run(model: Path, trace: Path) -> None:
    code = f"import os\nos.system('touch {trace}')\nclass Model: ...\nclass Config: ...\n"
    (model / "hostile.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "hostile.Config", "AutoModelForImageTextToText": "hostile.Model"}
    config["model_type"] = "hostile"
    config["architectures"] = ["Model"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises((CoconutError, ValueError, OSError)):
        MultimodalCoconut.from_pretrained(model)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["hostile.Model", None]}, "tokenizer_class": "Unknown"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with suppress(CoconutError, ValueError, OSError):  # a tokenizer that needs no code may load
        load_tokenizer(model)
    assert not trace.exists()


def test_a_checkpoint_of_pickles_is_no_checkpoint(tmp_path: Path, trace: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000001" / "engine"
    folder.mkdir(parents=True)
    torch.save(Hostile(trace), folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoint"):
        CheckpointFolder(tmp_path / "checkpoints", 2, {}).newest_valid()
    assert not trace.exists()
