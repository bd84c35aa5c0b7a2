"""A checkpoint folder and data in, evaluation folders out: what `launch/evaluate.py` does.

The model is loaded once, however many evaluations are made of it: importing and loading take longer than asking a small
model thousands of questions.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.evaluation.result import EvaluationOptions, EvaluationResult
from coconut.types import CheckpointError, ConfigError

if TYPE_CHECKING:
    from coconut.model.coconut import MultimodalCoconut

CHECKPOINT_FILE = "coconut.json"


@dataclass(frozen=True)
class Job:
    """One evaluation of a checkpoint: on which data, how, and where the result goes."""

    data: Path  # folder of shards, or a JSON or JSONL file
    out: Path
    options: EvaluationOptions


def find_checkpoint(path: Path) -> Path:
    """The folder that holds the weights: `path` itself, or `path`/final when a run folder is given.

    Raises:
        CheckpointError: neither is a checkpoint; names those that are there.
    """
    for folder in (path, path / "final"):
        if (folder / CHECKPOINT_FILE).is_file():
            return folder
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    inside = sorted(found.parent.name for found in path.glob(f"*/{CHECKPOINT_FILE}"))
    hint = f"; it contains {', '.join(inside)}" if inside else ""
    raise CheckpointError(f"{path} is no checkpoint: it has no {CHECKPOINT_FILE}{hint}")


def plan_jobs(
    checkpoint: Path, data: Sequence[Path], out: Path, options: EvaluationOptions, controls: bool = False
) -> list[Job]:
    """One job a data set; a single one writes to `out` itself, several to a folder each below it.

    Args:
        checkpoint: from `find_checkpoint`.
        data: data sets; the first is the one that controls are made on.
        out: folder to write.
        options: of all jobs.
        controls: also with the images shuffled, and with noise for thoughts if the checkpoint has any.

    Raises:
        ConfigError: a data set does not exist, or two have the same name.
    """
    for path in data:
        if not path.exists():
            raise ConfigError(
                f"data {path} does not exist; `python launch/prepare_data.py arrow-maze` makes the demo's"
            )
    jobs = [Job(path, out / path.stem, options) for path in data]
    if controls:
        first = jobs[0]
        changes: dict[str, dict[str, Any]] = {"images_shuffled": {"shuffle_images": True}}
        if (_stage_spec(checkpoint) or {}).get("n_latents"):
            changes["noise"] = {"thoughts": "noise"}
        for name, change in changes.items():
            folder = first.out.with_name(f"{first.out.name}-{name}")
            jobs.append(Job(first.data, folder, dataclasses.replace(options, **change)))
    names = [job.out.name for job in jobs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two data sets have the same name ({', '.join(names)}); evaluate them one by one")
    return jobs if len(jobs) > 1 else [Job(data[0], out, options)]


def evaluate_checkpoint(
    checkpoint: Path, jobs: Sequence[Job], *, image_root: Path | None = None, num_threads: int | None = None
) -> list[EvaluationResult]:
    """Load a checkpoint, ask it the questions of every job, and write predictions and summaries.

    Under a launcher every rank loads the model and takes its share of the batches.

    Args:
        checkpoint: folder that the trainer wrote, from `find_checkpoint`.
        jobs: from `plan_jobs`.
        image_root: folder of a JSON file's images; None is the file's own.
        num_threads: CPU threads a rank; None leaves torch's choice.

    Raises:
        CheckpointError: no checkpoint there, or one that does not say at which stage it was trained.
        DataError: the data cannot be used.
    """
    require_stage(checkpoint)
    # Everything a user can mistype is checked by now; what follows takes seconds to import.
    import torch

    from coconut.data import open_dataset
    from coconut.evaluation.evaluate import evaluate
    from coconut.evaluation.loaded import load
    from coconut.utils import distributed

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    distributed.init_distributed_training()
    log_to_console(distributed.is_main_process())
    sources = [open_dataset(job.data, image_root=image_root) for job in jobs]
    loaded = load(checkpoint)
    results = []
    for job, source in zip(jobs, sources, strict=True):
        result = evaluate(
            loaded.model,
            source,
            encoder=loaded.encoder,
            collator=loaded.collator,
            tokenizer=loaded.tokenizer,
            spec=loaded.spec,
            options=job.options,
        )
        results.append(result)
        if distributed.is_main_process():
            result.save(job.out, {"checkpoint": str(checkpoint), "data": str(job.data), **_facts(loaded.model, result)})
    distributed.barrier()
    distributed.shutdown_distributed()
    return results


def _facts(model: MultimodalCoconut, result: EvaluationResult) -> dict[str, Any]:
    """What a report wants to know besides the scores: where the model comes from, and what an answer costs."""
    import torch

    from coconut.evaluation.flops import generation_flops
    from coconut.utils.distributed import get_world_size

    config = model.base_model.config
    asked = [p for p in result.predictions if p.error is None]
    flops = [generation_flops(config, p.n_prompt_tokens, p.n_generated, p.n_patches) for p in asked]
    return {
        "metadata": model.metadata,
        "flops_per_sample": sum(flops) / len(flops),
        "machine": {
            "ranks": get_world_size(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "threads_per_rank": torch.get_num_threads(),
            "dtype": str(model.base_model.dtype).removeprefix("torch."),
        },
    }


def require_stage(checkpoint: Path) -> dict[str, Any]:
    """The stage that a checkpoint was trained at.

    Raises:
        CheckpointError: it names none, or is damaged.
    """
    spec = _stage_spec(checkpoint)
    if spec is None:
        raise CheckpointError(f"{checkpoint / CHECKPOINT_FILE} names no stage; save the checkpoint with the trainer")
    return spec


def require_thoughts(checkpoint: Path) -> None:
    """Raises CheckpointError where the checkpoint's stage has no thoughts."""
    spec = require_stage(checkpoint)
    if not spec["n_latents"]:
        raise CheckpointError(
            f"{checkpoint} was trained at stage {spec['stage']}, which has no thoughts; give a later stage of a "
            "coconut run"
        )


def _stage_spec(checkpoint: Path) -> dict[str, Any] | None:
    path = checkpoint / CHECKPOINT_FILE
    try:
        spec: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8"))["stage_spec"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); save the checkpoint again") from error
    return spec


def log_to_console(is_main: bool) -> None:
    """Progress and warnings of this project on standard error; the bars of other libraries stay away."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logger = logging.getLogger("coconut")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    logger.propagate = False
