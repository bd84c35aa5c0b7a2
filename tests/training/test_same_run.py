"""Which settings make a run, and what is said of those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from coconut.config import Config
from coconut.training.resume import check_same_run, fixed_settings, say_changes
from coconut.training.run_folder import CONFIG_FILE
from coconut.types import ConfigError
from coconut.utils.distributed import collective_timeout_s
from launch.train import is_done


def config(folder: Path, **settings: object) -> Config:
    return Config({"save_path": str(folder), "name": "run", **settings})


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    first = config(tmp_path, stop_after_stage=0)
    (first.run_dir / "stage_0").mkdir(parents=True)
    (first.run_dir / "stage_0" / "done.json").write_text("{}")
    first.save(first.run_dir / CONFIG_FILE)
    return tmp_path


@pytest.mark.parametrize(
    "change", [{"uniform_prob": 0.9}, {"stages": {"last": {"uniform_prob": 0.5}}}, {"c_thought": 3}]
)
def test_what_decides_which_texts_are_trained_makes_a_run(begun: Path, change: dict[str, object]) -> None:
    assert fixed_settings(config(begun)) != fixed_settings(config(begun, **change))
    with pytest.raises(
        ConfigError, match=f"is of another run: .*{next(iter(change)) if 'stages' not in change else ''}"
    ):
        check_same_run(config(begun, **change))


def test_a_stage_that_is_done_is_not_taken_for_another_runs(begun: Path) -> None:
    assert is_done(config(begun, stop_after_stage=0))
    with pytest.raises(ConfigError, match=r"seed was 42 and is 7"):
        is_done(config(begun, stop_after_stage=0, seed=7))


def test_settings_that_may_change_are_named(begun: Path, caplog: pytest.LogCaptureFixture) -> None:
    # max_length too: a sample that is too long is an error that says to raise it.
    now = config(begun, stop_after_stage=2, learning_rate=0.3, max_length=99)
    check_same_run(now)
    with caplog.at_level("INFO"):
        say_changes(now.run_dir, now)
    assert "learning_rate was 1e-05 and is 0.3" in caplog.text and "max_length was None and is 99" in caplog.text
    assert "stop_after_stage" not in caplog.text


def test_the_watchdog_speaks_before_a_collective_gives_up() -> None:
    assert collective_timeout_s(1800.0) == 3600.0
    assert collective_timeout_s(60.0) == 1800.0
    assert collective_timeout_s(None) > 24 * 3600
