"""One cluster for all tests here, and a folder to submit from."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.prepare_data import prepare_arrow_maze
from tests.slurm.cluster import Cluster
from tests.slurm.runs import Runs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three virtual nodes; two for the job, one to spare."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not below pytest's: a socket's path has to be short
    machine = Cluster(folder)
    try:
        machine.start()
        yield machine
    finally:
        machine.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    """A folder as a user's clone looks, with a small maze in it and a site file."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("args", "ds_configs", "launch"):
        (folder / name).symlink_to(project / name)
    (folder / "slurm" / "logs").mkdir(parents=True)
    for script in (project / "slurm").glob("*.sh"):
        if script.name != "site.sh":
            (folder / "slurm" / script.name).symlink_to(script)
    (folder / "slurm" / "site.sh").write_text(f'COCONUT_PYTHON="{sys.executable}"\nCOCONUT_NETWORK=lo\n')
    sizes = {"train": 256, "val": 32, "test": 32, "test_paths": 16}
    prepare_arrow_maze(folder / "data" / "arrow_maze", sizes=sizes)
    return folder


@pytest.fixture(scope="session")
def runs(cluster: Cluster, home: Path, full: bool) -> Runs:
    return Runs(cluster, home, full)


@pytest.fixture(scope="session")
def unbroken(runs: Runs) -> str:
    """An array that nothing disturbs, one element longer than the run; its number."""
    end = runs.last + 1
    # Without %1 all elements start at once: the later ones have to step back.
    job = runs.submit("unbroken", options=(f"--array=0-{end}",))
    runs.wait(job, last=end)
    return job
