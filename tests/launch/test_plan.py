"""`launch/plan.py` on a configuration with its data, on a published shape, and on bad input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.plan import main
from launch.prepare_data import prepare_arrow_maze


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "maze"
    prepare_arrow_maze(folder, sizes={"train": 256, "val": 16, "test": 16, "test_paths": 16})
    return folder


def overrides(maze: Path, tmp_path: Path) -> list[str]:
    return [f"model_id={maze / 'model'}", f"train_data_path={maze / 'shards' / 'train'}", f"save_path={tmp_path}"]


def test_a_run_with_data(maze: Path, tmp_path: Path, project: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(project)
    own = [*overrides(maze, tmp_path), "val_data_path=null", "test_data_path=null", "advance_at=null"]
    arguments = ["args/demo.yaml", "--ranks", "2", "--deepspeed", "ds_configs/zero2.json", *own]
    assert main([*arguments, "samples_per_epoch=null", "global_batch_size=32"]) == 0
    text = capsys.readouterr().out
    assert "computed, not measured" in text and "256 samples" in text
    assert "2, ZeRO stage 2" in text
    assert "256 samples in 8 steps" in text
    assert "optimizer" in text and "activations" in text and "fits" in text
    assert main([*arguments, "--memory", "0.00001"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_run_that_trains_a_part_with_a_batch_of_its_own_in_one_stage(
    maze: Path, tmp_path: Path, project: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(project)
    own = [*overrides(maze, tmp_path), "val_data_path=null", "test_data_path=null", "advance_at=null"]
    own += ["samples_per_epoch=null", "global_batch_size=32", "max_latent_stage=1", "freeze=[language,vision]"]
    arguments = ["args/demo.yaml", "--ranks", "2", *own]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    total, trained = (int(n.replace(",", "")) for n in re.findall(r"parameters +([\d,]+), ([\d,]+) of", text)[0])
    assert 0 < trained < total
    assert text.count("256 samples in 8 steps") == 1 and "16 samples x" in text
    assert main([*arguments, "stages.0.global_batch_size=128", "stages.0.batch_size_training=64"]) == 0
    text = capsys.readouterr().out
    assert "64 samples x" in text and "label tokens; stage 0" in text
    assert re.search(r"stage 0\n.*\n.*256 samples in 2 steps.*\nstage 1\n.*\n.*256 samples in 8 steps", text)


@pytest.mark.parametrize(
    "own", ["method=pause", "method=pause_multipass", "latent_feedback=normed", "latent_passes=jacobi"]
)
def test_every_way_of_thinking_is_planned(own: str, maze: Path, tmp_path: Path, project: Path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    data = ["val_data_path=null", "test_data_path=null", "advance_at=null", "samples_per_epoch=null"]
    assert main(["args/demo.yaml", "--ranks", "1", *overrides(maze, tmp_path), *data, own]) == 0
    assert "fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "--ranks is 0; give a number of at least 1"),
        (["--ranks", "-4"], "--ranks is -4; give a number of at least 1"),
        (["--ranks", "2", "--tiles", "-1"], "--tiles is -1; give a number of at least 0"),
        (["--ranks", "2", "--memory", "0"], "--memory is 0; give the GB of a GPU, a number above 0 such as 80"),
        (["--ranks", "2", "--memory", "-80"], "--memory is -80; give"),
        (["--ranks", "2", "--memory", "nan"], "--memory is nan; give"),
        (["--ranks", "2", "--model", "internvl3-1b", "batch_size_training=0"], "batch_size_training = 0: must be"),
        (["--ranks", "2", "--labels", "300"], "--labels is 300; they are part of --text, 200"),
        (["--ranks", "2", "--model", "internvl3-2b"], "there is no preset 'internvl3-2b'; choose from internvl3-1b"),
        (["--ranks", "2", "c_thought=0"], "c_thought = 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], said: str, project: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(project)
    assert main(["args/demo.yaml", *arguments]) == 2
    assert said in capsys.readouterr().err
