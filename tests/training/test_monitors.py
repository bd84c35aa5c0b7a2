"""Where metrics go beside metrics.jsonl: TensorBoard through DeepSpeed's monitor, and wandb; each number once."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coconut.config import Config
from coconut.config.deepspeed import resolve_ds_config
from coconut.types import ConfigError
from tests.training.ranks import SMALL, run


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.slow
@pytest.mark.distributed
def test_tensorboard_holds_what_metrics_jsonl_holds_after_a_step_back_too(home: Path) -> None:
    common = ("tensorboard=true", "save_every_n_steps=2", "max_checkpoints=9")
    first = run(home, "board", "max_steps=6", *common)
    resolved = json.loads((first.folder / "ds_config.json").read_text())
    assert resolved["tensorboard"]["enabled"] and not list(home.glob("DeepSpeedJobName*"))
    again = run(home, "board", "max_steps=8", f"resume={first.folder}/checkpoints/step-00000004", *common)
    found, rows = scalars(again.folder / "tensorboard"), again.rows()
    assert [row["step"] for row in rows] == list(range(1, 9))
    for name in ("loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes"):
        assert [step for step, _ in found[f"train/{name}"]] == list(range(1, 9))
        assert [value for _, value in found[f"train/{name}"]] == pytest.approx([row[name] for row in rows])
    assert "train/step" not in found and not any(name.startswith("Train/") for name in found)
    assert found["val/accuracy"][-1][0] == again.rows("val")[-1]["step"]
    # A run that starts anew has nothing to do with the old one's events.
    anew = run(home, "board", "max_steps=2", "resume=none", *common)
    assert [step for step, _ in scalars(anew.folder / "tensorboard")["train/loss"]] == [1, 2]
    assert len(scalars(anew.folder / "old-1" / "tensorboard")["train/loss"]) == 8


def test_a_section_of_the_deepspeed_file_is_enough_and_may_name_its_folder(tmp_path: Path) -> None:
    def resolve(content: dict, **settings: object) -> dict:
        (tmp_path / "ds.json").write_text(json.dumps(content))
        config = Config({"deepspeed": str(tmp_path / "ds.json"), "save_path": str(tmp_path), "name": "a", **settings})
        return resolve_ds_config(config, world_size=1, hidden_size=8)

    here = {"enabled": True, "output_path": str(tmp_path / "a"), "job_name": "tensorboard"}
    assert resolve({"tensorboard": {"enabled": True}})["tensorboard"] == here
    assert resolve({}, tensorboard=True)["tensorboard"] == here
    own = {"enabled": True, "output_path": "elsewhere", "job_name": "b"}
    assert resolve({"tensorboard": own})["tensorboard"] == own
    with pytest.raises(ConfigError, match="but tensorboard asks for True"):
        resolve({"tensorboard": {"enabled": False}}, tensorboard=True)
    with pytest.raises(ConfigError, match="both write to one wandb run"):
        resolve({"wandb": {"enabled": True}}, use_wandb=True)


def test_tensorboard_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        resolve_ds_config(Config({"tensorboard": True, "save_path": str(tmp_path)}), world_size=1, hidden_size=8)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_resumed_run_goes_on_in_the_same_wandb_run(home: Path) -> None:
    """Offline: two folders of one run, whose steps together are the run's, each once."""
    # As processes of their own: forked ranks would share wandb's service.
    environment = {name: value for name, value in os.environ.items() if "SERVICE" not in name}

    def train(*words: str) -> None:
        command = [sys.executable, "launch/train.py", "name=wandb", "use_wandb=true", *SMALL, *words]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, env=environment, timeout=400)
        assert done.returncode == 0, done.stderr

    folder = home / "runs" / "wandb"
    train("max_steps=3")
    train("max_steps=5")
    folders = sorted((folder / "wandb").glob("offline-run-*"))
    run_id = (folder / "wandb_id.txt").read_text().strip()
    assert [folder.name.rsplit("-", 1)[1] for folder in folders] == [run_id, run_id]
    assert [steps(folder) for folder in folders] == [[1, 2, 3], [4, 5]]
    train("max_steps=1", "resume=none")
    assert (folder / "wandb_id.txt").read_text().strip() != run_id


def steps(folder: Path) -> list[int]:
    """Steps at which a training loss was logged, from wandb's own file."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    found = []
    for data in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in items:
            found.append(items["_step"])
    return found


def records(content: bytes) -> Iterator[bytes]:
    """LevelDB's log format, after a header of seven bytes: blocks of pieces, each with checksum, length and kind."""
    place, block, whole = 7, 32768, b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # no piece begins in the last bytes of a block
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""
