"""`launch/doctor.py`: what it finds on this machine, and what it says when something is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from launch import doctor


def test_quick_examination_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main(["--quick", "--run", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert code == (1 if "WRONG" in shown else 0)
    assert "ok    python: 3." in shown and "ok    run folder" in shown and "ok    torch" in shown
    assert not list((tmp_path / "run").iterdir())  # it leaves nothing behind


def test_faults_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert doctor.main(["--quick", "--run", str(tmp_path / "file" / "run"), "--gpus", "99"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG run folder" in shown and "cannot be written to" in shown
    assert "WRONG GPUs" in shown and "doctor: all is well" not in shown


def test_a_full_disk_and_old_packages_are_faults(tmp_path: Path) -> None:
    with pytest.raises(doctor.Fault, match="make room"):
        doctor.check_folder(tmp_path, least_gb=1e9)
    with pytest.raises(doctor.Fault, match="older than 99"):
        doctor.check_package("torch", "99.0", do_import=False)
    with pytest.raises(doctor.Fault, match="not installed"):
        doctor.check_package("no-such-package", "1.0", do_import=False)
    assert doctor.numbers("2.14.0+cu130") == [2, 14, 0]


def test_the_doctor_asks_for_what_an_installation_would(project: Path) -> None:
    wanted = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    for package in doctor.PACKAGES:
        assert f"{package}>={doctor.least_version(package)}" in wanted
