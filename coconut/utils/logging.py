"""Log lines: to the console and the run folder from the main process, warnings from the others, metrics to wandb."""

from __future__ import annotations

import importlib.util
import logging
import sys
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from coconut.types import ConfigError
from coconut.utils.distributed import get_rank

if TYPE_CHECKING:
    from coconut.config import Config

ROOT = "coconut"
WANDB_ID_FILE = "wandb_id.txt"
_LINE = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_RANK_LINE = "%(asctime)s %(levelname)-7s [rank {rank}] %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """A logger below ``coconut``, to whose lines :func:`setup_logging` gives a form and a place."""
    if name == ROOT or name.startswith(f"{ROOT}."):
        return logging.getLogger(name)
    return logging.getLogger(f"{ROOT}.{name.strip('_') or 'main'}")


def setup_logging(config: Config) -> None:
    """Sends log lines to the console and ``RUN/log.txt``, starts wandb if asked for, and says the config's notes.

    Call it after ``init_distributed_training``: the main process logs from ``log_level`` up, each other rank only
    warnings and errors, marked with its number. Calling it again replaces the earlier set-up.

    Raises:
        ConfigError: wandb is asked for and cannot start.
    """
    rank = get_rank()
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False  # other libraries configure the root logger; a line must not appear twice
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if rank == 0:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(config.run_dir / "log.txt", encoding="utf-8"))
    formatter = logging.Formatter(_LINE if rank == 0 else _RANK_LINE.format(rank=rank))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    level = logging.getLevelNamesMapping()[config.log_level]
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    for note in config.notes:
        logger.info(note)
    if config.use_wandb and rank == 0:
        _start_wandb(config)


def log_to_wandb(row: Mapping[str, Any], step: int | None = None) -> None:
    """Adds a row of metrics to the wandb run that :func:`setup_logging` started; without one, does nothing."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.log(dict(row), step=step)


def _start_wandb(config: Config) -> None:
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("use_wandb = True, but wandb is not installed: pip install wandb, or set use_wandb: false")
    import wandb

    try:
        wandb.init(
            project=config.wandb_project or config.project,
            name=config.name,
            dir=str(config.run_dir),
            config=config.to_dict(),
            id=_wandb_id(config),
            resume="allow",
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"use_wandb = True, but wandb cannot start: {error}. "
            "Run `wandb login`, set WANDB_MODE=offline, or set use_wandb: false"
        ) from error


def _wandb_id(config: Config) -> str:
    """The id of the wandb run that this run goes on in: the same as long as it goes on from a checkpoint."""
    path = config.run_dir / WANDB_ID_FILE
    is_new = config.resume == "none" or (config.resume == "auto" and not any(config.run_dir.glob("checkpoints/step-*")))
    if is_new or not path.is_file():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
