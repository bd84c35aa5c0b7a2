"""Examine this machine: can it train? Says what is wrong and how to mend it; exit code 1 when something is.

    python launch/doctor.py                                  this machine, imports included
    python launch/doctor.py --quick --run RUN --ranks 8 --gpus 8     in a second or two: what a job does on every node

Quick means: versions are read from the packages' metadata, without importing them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LEAST_PYTHON = (3, 11)
PACKAGES = ("torch", "transformers", "deepspeed", "webdataset")
SHM = Path("/dev/shm")  # noqa: S108 - shared memory, not a temporary file
LEAST_SHM_MB = 64  # what containers get by default; loader processes pass batches through it


class Fault(Exception):
    """Something that keeps a run from working, and how to mend it."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="do not import the libraries")
    add("--run", type=Path, default=Path("runs"), help="folder that must be writable (default: %(default)s)")
    add("--ranks", type=int, default=1, help="ranks that shall run on this machine (default: 1)")
    add("--gpus", type=int, default=0, help="GPUs that must be visible (default: 0, none needed)")
    add("--min-free-gb", type=float, default=1.0, help="least free space for --run, in GB (default: 1)")
    arguments = parser.parse_args(argv)
    faults = 0
    for name, check in checks(arguments):
        try:
            print(f"  ok    {name}: {check()}")
        except Fault as fault:
            faults += 1
            print(f"  WRONG {name}: {fault}")
    print(f"doctor: {f'{faults} fault(s)' if faults else 'all is well'} on {socket.gethostname()}")
    return 1 if faults else 0


def checks(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every check with its name; a check returns what it found, or raises Fault."""
    yield "python", check_python
    for package in PACKAGES:
        yield package, partial(check_package, package, least_version(package), not arguments.quick)
    yield "run folder", lambda: check_folder(arguments.run, arguments.min_free_gb)
    yield "temporary folder", lambda: check_folder(Path(tempfile.gettempdir()), 0.1)
    yield "shared memory", check_shared_memory
    yield "processors", lambda: check_processors(arguments.ranks)
    yield "GPUs", lambda: check_gpus(arguments.gpus, arguments.ranks)
    yield "native builds", check_builds


def check_python() -> str:
    if sys.version_info < LEAST_PYTHON:
        raise Fault(f"{sys.version.split()[0]} at {sys.executable} is too old; 3.11 is needed: run launch/setup.sh")
    return f"{sys.version.split()[0]} at {sys.executable}"


def check_package(name: str, least: str, do_import: bool) -> str:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise Fault(f"is not installed for {sys.executable}; run launch/setup.sh, or set COCONUT_PYTHON") from None
    if numbers(found) < numbers(least):
        raise Fault(f"{found} is older than {least}; run launch/setup.sh")
    if do_import:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever an installation that is broken may raise
            raise Fault(f"{found} cannot be imported ({type(error).__name__}: {error}); install it anew") from error
    return found


def least_version(package: str) -> str:
    """The oldest version that pyproject.toml admits, read without tomllib: an old Python is a fault to be named."""
    found = re.search(rf'^ *"{package}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found, f"pyproject.toml gives no oldest version of {package}"
    return found[1]


def numbers(version: str) -> list[int]:
    """[2, 14, 0] for 2.14.0+cu130."""
    parts = version.split("+")[0].split(".")
    return [int(part) for part in parts if part.isdigit()]


def check_folder(folder: Path, least_gb: float) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Fault(f"{folder} cannot be written to ({error}); is the shared disk mounted here?") from error
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < least_gb:
        raise Fault(
            f"{folder} has {free_gb:.1f} GB left, {least_gb:g} are needed; make room or choose another save_path"
        )
    return f"{folder}, {free_gb:.0f} GB free"


def check_shared_memory() -> str:
    if not SHM.is_dir():
        raise Fault(f"{SHM} is missing; mount it (containers: --ipc=host, or --shm-size)")
    free_mb = shutil.disk_usage(SHM).free / 1e6
    if free_mb < LEAST_SHM_MB:
        raise Fault(f"{SHM} has {free_mb:.0f} MB left, {LEAST_SHM_MB} are needed; remove what dead jobs left there")
    return f"{free_mb:.0f} MB free"


def check_processors(ranks: int) -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{usable} for {ranks} rank(s)" + ("" if usable >= ranks else "; they will share, which is slow")


def check_gpus(wanted: int, ranks: int) -> str:
    if wanted == 0 and shutil.which("nvidia-smi") is None:
        return "none asked for"
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Fault(f"{wanted} GPU(s) were given to the job, and nvidia-smi does not answer ({error})") from error
    found = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    if done.returncode or len(found) < wanted:
        raise Fault(f"{len(found)} of {wanted} GPU(s) answer nvidia-smi {done.stderr.strip()}; drain this node")
    if found and len(found) < ranks:
        raise Fault(f"{len(found)} GPU(s) for {ranks} ranks; ask for more, or set COCONUT_RANKS_PER_NODE={len(found)}")
    return f"{len(found)} visible" + (f", {found[0].split(' (UUID')[0]}" if found else "")


def check_builds() -> str:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or ROOT / ".cache" / "torch_extensions")
    if shutil.which("nvidia-smi") is None and not any(folder.glob("*/*.so")):
        raise Fault(f"{folder} holds no build of DeepSpeed's CPU collectives; run launch/setup.sh on one machine first")
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
