"""A run folder: one run at a time, whole folders, and nothing lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coconut.training.run_folder import hold_run, replace_folder, restore_replaced, set_aside
from coconut.types import ConfigError


def test_setting_aside_loses_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "stage_0").mkdir()
        (tmp_path / "metrics.jsonl").write_text(str(number))
        target = set_aside(tmp_path, ("stage_*", "metrics.jsonl", "final"))
        assert target == tmp_path / f"old-{number}"
        assert (target / "metrics.jsonl").read_text() == str(number) and (target / "stage_0").is_dir()
    assert set_aside(tmp_path, ("stage_*",)) is None


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        (tmp_path / "partial").mkdir()
        (tmp_path / "partial" / "file").write_text(content)
        replace_folder(tmp_path / "partial", tmp_path / "final")
        assert (tmp_path / "final" / "file").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_a_killed_replacement_moved_away_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".step-1.old").mkdir()
    (tmp_path / ".step-2.old").mkdir()
    (tmp_path / "step-2").mkdir()
    restore_replaced(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run cannot be written to: Not a directory; choose another save_path"):
        hold_run(tmp_path / "file" / "run")


@pytest.mark.slow
def test_one_run_at_a_time_in_a_folder_and_the_holder_is_named(tmp_path: Path, project: Path) -> None:
    code = "import sys, os; from pathlib import Path; from coconut.training.run_folder import hold_run\n"
    code += "hold_run(Path(sys.argv[1])); print(os.getpid(), flush=True); sys.stdin.read()"
    environment = {"SLURM_JOB_ID": "123_4", "PYTHONPATH": str(project), "PATH": ""}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        pid = holder.stdout.readline().strip()
        with pytest.raises(ConfigError, match=rf"another run is writing to .* pid {pid}, SLURM job 123_4\)"):
            hold_run(tmp_path)
        holder.stdin.close()
    assert hold_run(tmp_path)
    assert not hold_run(tmp_path)  # this process has it
