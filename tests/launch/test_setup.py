"""`launch/setup.sh`: the environment that it makes, with uv where that is here, else with venv."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_environment_has_a_pip_of_its_own(project: Path, tmp_path: Path) -> None:
    """Documents and messages say `pip install ...`: without one a shell would find another environment's."""
    (tmp_path / "launch").mkdir()
    shutil.copy(project / "launch" / "setup.sh", tmp_path / "launch")
    make = ["bash", "-euo", "pipefail", "-c", ". launch/setup.sh && make_venv"]
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pip = tmp_path / ".venv" / "bin" / "pip"
    shown = subprocess.run([str(pip), "--version"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / ".venv") in shown
