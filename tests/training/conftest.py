"""A folder in which runs are started."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.prepare_data import prepare_arrow_maze


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    """A folder as a user's clone looks, with a small maze in it."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("args", "ds_configs", "launch"):
        (folder / name).symlink_to(project / name)
    sizes = {"train": 256, "val": 16, "test": 16, "test_paths": 16}
    prepare_arrow_maze(folder / "data" / "arrow_maze", sizes=sizes)
    return folder
