"""`launch/doctor.py`: what it finds on this machine, and what it says when something is wrong: really wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from launch import doctor, doctor_checks


def examine(
    project: Path, run: Path, *words: str, before: tuple[str, ...] = (), **environment: str
) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and level and text of each line, of a doctor started as a user does."""
    command = [*before, sys.executable, str(project / "launch" / "doctor.py"), "--json", "--run", str(run), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=400)
    found = json.loads(done.stdout)
    assert found["ok"] == (done.returncode == 0)
    return done.returncode, {one["name"]: (one["level"], one["text"]) for one in found["checks"]}


def test_quick_examination_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main(["--quick", "--run", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert code == (1 if "FAIL" in shown else 0)
    assert "OK    python: 3." in shown and "OK    run folder" in shown and "OK    torch" in shown
    assert re.search(r"^doctor: (all is well|\d+ fault)", shown, re.MULTILINE)
    assert not list((tmp_path / "run").iterdir())  # it leaves nothing behind


def test_a_quick_examination_imports_nothing(project: Path, tmp_path: Path) -> None:
    code = f"import sys; from launch import doctor; doctor.main(['--quick', '--run', {str(tmp_path)!r}]); "
    code += "assert not {'torch', 'deepspeed', 'pydantic'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True).returncode == 0


def test_faults_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert doctor.main(["--quick", "--run", str(tmp_path / "file" / "run"), "--gpus", "99"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL  run folder" in shown and "cannot be written to" in shown
    assert "FAIL  GPUs" in shown and "doctor: all is well" not in shown


def test_a_full_disk_and_old_packages_are_faults(tmp_path: Path) -> None:
    with pytest.raises(doctor.Fault, match="make room"):
        doctor_checks.check_folder(tmp_path, least_gb=1e9)
    with pytest.raises(doctor.Fault, match="older than 99"):
        doctor_checks.check_package("torch", "99.0", do_import=False)
    with pytest.raises(doctor.Fault, match="not installed"):
        doctor_checks.check_package("no-such-package", "1.0", do_import=False)
    assert doctor_checks.numbers("2.14.0+cu130") == [2, 14, 0]


def test_the_doctor_asks_for_what_an_installation_would(project: Path) -> None:
    wanted = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    read = doctor_checks.requirements("dependencies")
    assert [f"{name}>={least}" for name, least in read.items()] == wanted["dependencies"]
    assert set(doctor_checks.IMPORTED) | set(doctor_checks.WRONG_BEFORE) <= set(read)
    extras = [
        one for name, group in wanted["optional-dependencies"].items() if name != "dev" for one in group if ">=" in one
    ]
    assert [f"{name}>={least}" for name, least in doctor_checks.requirements("optional").items()] == extras


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_an_old_deepspeed_is_refused_and_why(project: Path, tmp_path: Path) -> None:
    install(tmp_path / "site", "deepspeed", "0.19.3")
    install(tmp_path / "site", "torchvision", "99.0+cpu")
    install(tmp_path / "site", "rich", "1.0")
    code, found = examine(project, tmp_path / "run", "--quick", PYTHONPATH=str(tmp_path / "site"))
    assert code == 1 and found["deepspeed"][0] == "FAIL"
    assert "0.19.3 is older than" in found["deepspeed"][1] and "DeepSpeed#8148" in found["deepspeed"][1]
    assert found["torch and torchvision"][0] == "FAIL" and "install both from one" in found["torch and torchvision"][1]
    assert found["other packages"][0] == "FAIL" and "rich 1.0" in found["other packages"][1]


def test_no_compiler_on_the_path(project: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    bare = {"PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "builds")}
    code, found = examine(project, tmp_path / "run", "--quick", **bare)
    assert code == 1 and found["compilers"][0] == "FAIL" and "apt-get install g++" in found["compilers"][1]
    assert found["native builds"][0] == "FAIL"
    build = tmp_path / "builds" / "deepspeed_shm_comm"
    build.mkdir(parents=True)
    (build / "deepspeed_shm_comm.so").touch()
    _, found = examine(project, tmp_path / "run", "--quick", **bare)
    assert found["compilers"][0] == "WARN" and found["native builds"][0] == "OK"
    (build.parent / "other").mkdir()
    (build.parent / "other" / "lock").touch()
    os.utime(build.parent / "other" / "lock", (time.time() - 3600,) * 2)
    _, found = examine(project, tmp_path / "run", "--quick", **bare)
    assert found["native builds"][0] == "WARN" and "was killed" in found["native builds"][1]


def test_too_few_open_files(project: Path, tmp_path: Path) -> None:
    limited = ("sh", "-c", 'ulimit -n 128; exec "$0" "$@"')
    code, found = examine(project, tmp_path / "run", "--quick", before=limited)
    assert code == 1 and found["open files"][0] == "FAIL" and "ulimit -n 1024" in found["open files"][1]


def test_too_little_shared_memory(project: Path, tmp_path: Path) -> None:
    """A tmpfs of 16 MB over /dev/shm, in a mount namespace of its own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, to mount a small /dev/shm")

    def with_shm(megabytes: int) -> tuple[str, str]:
        mount = f"mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm"
        inside = ("unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$@"')
        return examine(project, tmp_path / "run", "--quick", "--ranks", "2", before=inside)[1]["shared memory"]

    level, text = with_shm(16)
    assert level == "FAIL" and "64 are needed and 2000 recommended" in text and "--shm-size=2g" in text
    level, text = with_shm(500)
    assert level == "WARN" and "2000 are recommended for 2 rank(s)" in text


def test_a_check_that_breaks_is_a_fault_itself() -> None:
    level, text = doctor.examine(lambda: str(1 / 0))
    assert level == "FAIL" and "ZeroDivisionError" in text


@pytest.mark.slow
@pytest.mark.distributed
def test_a_whole_examination_reduces_over_two_ranks(project: Path, tmp_path: Path) -> None:
    _, found = examine(project, tmp_path / "run", "--timeout", "300")
    level, text = found["all-reduce of two ranks"]
    assert level == "OK" and re.fullmatch(r"(gloo|NCCL), \d+ s", text), text
    assert {name: level for name, (level, _) in found.items() if level == "FAIL"} == {}
    assert {"accelerator", "communication", "CUDA compiler", "DeepSpeed operators"} <= set(found)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(doctor.Fault, match="no answer after 0 s"):
        doctor_checks.check_two_ranks(0.2)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "nosuchdevice0")
    with pytest.raises(doctor.Fault, match=r"the ranks ended with .* check (GLOO|NCCL)_SOCKET_IFNAME"):
        doctor_checks.check_two_ranks(300)
