"""What every test may count on: one thread, no network, no leftovers of other tests; and in what order they run."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Before torch or transformers are imported by any test, here or in a rank that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"

import pytest

from coconut.utils.distributed import LAUNCHER_VARIABLES, prepare_native_builds

PROJECT = Path(__file__).resolve().parents[1]
SLURM_COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")

prepare_native_builds()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first: what fails soonest is seen soonest."""

    def lateness(item: pytest.Item) -> int:
        late = ("distributed", "gpu", "slow")
        rank = max((place for place, name in enumerate(late, 1) if item.get_closest_marker(name)), default=0)
        if "e2e" in item.path.parts:
            rank = 4
        return 5 if item.get_closest_marker("slurm") else rank

    items.sort(key=lateness)  # stable: inside a group the order stays


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slurm"):
        _need_slurm()
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def _need_slurm() -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [command for command in SLURM_COMMANDS if shutil.which(command, path=path) is None]
    reason = f"needs SLURM: {', '.join(missing)} not found" if missing else ""
    if not missing and os.geteuid() != 0:
        reason = "needs root, to start a private SLURM cluster"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason + "; CI=true admits no skipping")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's folder."""
    return PROJECT


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether long tests run at full length (``bash launch/test.sh --full``)."""
    return os.environ.get("COCONUT_FULL_TESTS") == "1"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are not ranks, even where the shell that started them is one."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Takes back what a test's setup_logging did."""
    logger = logging.getLogger("coconut")
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    yield
    for handler in logger.handlers:
        if handler not in handlers:
            handler.close()
    logger.handlers[:] = handlers
    logger.propagate, logger.level = propagate, level
