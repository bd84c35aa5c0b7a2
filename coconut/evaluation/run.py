"""A checkpoint folder and data in, evaluation folders out: what `launch/evaluate.py` does.

The model is loaded once, however many evaluations are made of it: importing and loading take longer than asking a small
model thousands of questions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.evaluation.metrics import METRICS
from coconut.evaluation.result import SUMMARY_FILE, EvaluationOptions, EvaluationResult
from coconut.types import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from coconut.data.shards import ShardReader
    from coconut.evaluation.interventions import SampleSource
    from coconut.model.coconut import MultimodalCoconut

CHECKPOINT_FILE = "coconut.json"
_SAMPLES_LOOKED_AT = 20


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
    if path.is_file():
        raise CheckpointError(f"checkpoint {path} is a file; give its folder, {path.parent}")
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    inside = [found.parent for pattern in ("*", "*/*") for found in sorted(path.glob(f"{pattern}/{CHECKPOINT_FILE}"))]
    hint = f"; it contains {', '.join(str(folder.relative_to(path)) for folder in inside)}" if inside else ""
    raise CheckpointError(f"{path} is no checkpoint: it has no {CHECKPOINT_FILE}{hint}")


def plan_jobs(
    checkpoint: Path,
    data: Sequence[Path],
    out: Path,
    options: EvaluationOptions,
    controls: bool = False,
    latents: Sequence[int] = (),
    image_root: Path | None = None,
) -> list[Job]:
    """One job a data set; a single one writes to `out` itself, several to a folder each below it.

    Args:
        checkpoint: from `find_checkpoint`.
        data: data sets; the first is the one that controls and numbers of thoughts are tried on.
        out: folder to write.
        options: of all jobs.
        controls: also with the images shuffled if model and data have any, and with noise for thoughts if it has any.
        latents: also with each of these numbers of thoughts, if the checkpoint has any.
        image_root: folder of a JSON file's images; None is the file's own.

    Raises:
        ConfigError: a data set does not exist, or two have the same name.
        DataError: one that controls are tried on cannot be read.
        CheckpointError: numbers of thoughts for a checkpoint that was trained without.
    """
    for path in data:
        if not path.exists():
            raise ConfigError(
                f"data {path} does not exist; `python launch/prepare_data.py arrow-maze` makes the demo's"
            )
    jobs = [Job(path, out / path.resolve().stem, options) for path in data]
    first = jobs[0]
    changes: dict[str, dict[str, Any]] = {}
    if controls:
        if _sees_images(checkpoint) and _shows_images(first, image_root):
            changes["images_shuffled"] = {"shuffle_images": True}
        if (_stage_spec(checkpoint) or {}).get("n_latents"):
            changes["noise"] = {"thoughts": "noise"}
    if latents:
        require_thoughts(checkpoint)
        require_room(checkpoint, max(latents))
        changes |= {f"latents_{number}": {"latents": number} for number in latents}
    for name, change in changes.items():
        folder = first.out.with_name(f"{first.out.name}-{name}")
        jobs.append(Job(first.data, folder, dataclasses.replace(options, **change)))
    names = [job.out.name for job in jobs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two data sets have the same name ({', '.join(names)}); evaluate them one by one")
    return jobs if len(jobs) > 1 else [Job(data[0], out, options)]


def evaluate_checkpoint(
    checkpoint: Path,
    jobs: Sequence[Job],
    *,
    image_root: Path | None = None,
    num_threads: int | None = None,
    fresh: bool = False,
) -> list[EvaluationResult]:
    """Load a checkpoint, ask it the questions of every job, and write predictions and summaries.

    Under a launcher every rank loads the model and takes its share of the batches. A job that is complete is read, one
    that was killed goes on, as long as checkpoint, data and options are what they were.

    Args:
        checkpoint: folder that the trainer wrote, from `find_checkpoint`.
        jobs: from `plan_jobs`.
        image_root: folder of a JSON file's images; None is the file's own.
        num_threads: CPU threads a rank; None leaves torch's choice. The same number gives the same last digits.
        fresh: ask everything anew, whatever is there.

    Raises:
        CheckpointError: no checkpoint there, or one that does not say at which stage it was trained.
        DataError: the data cannot be used.
    """
    require_stage(checkpoint)
    # Everything a user can mistype is checked by now; what follows takes seconds to import.
    import torch

    from coconut.data import open_dataset
    from coconut.evaluation.evaluate import evaluate
    from coconut.evaluation.loaded import Loaded, load
    from coconut.evaluation.progress import Progress
    from coconut.utils import distributed

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    distributed.init_distributed_training()
    log_to_console(distributed.is_main_process())
    sources = [open_dataset(job.data, image_root=image_root) for job in jobs]
    for job, source in zip(jobs, sources, strict=True):
        _require_truth(source, job.options.metric)
    if _sees_images(checkpoint) and distributed.is_main_process():
        _warn_of_no_images({job.data: source for job, source in zip(jobs, sources, strict=True)})
    loaded: Loaded | None = None
    results = []
    for job, source in zip(jobs, sources, strict=True):
        identity = _identity(checkpoint, job, source)
        kept = distributed.on_main_first(partial(_kept, job.out, identity, fresh))
        if kept is not None:
            results.append(kept)
            continue
        loaded = loaded or load(checkpoint)
        _forget_peak_memory()
        progress = Progress(job.out, identity)
        result = evaluate(
            loaded.model,
            source,
            encoder=loaded.encoder,
            collator=loaded.collator,
            tokenizer=loaded.tokenizer,
            spec=loaded.spec,
            options=job.options,
            progress=progress,
        )
        results.append(result)
        if distributed.is_main_process():
            extra = {"checkpoint": str(checkpoint), "data": str(job.data), "identity": identity}
            result.save(job.out, {**extra, **_facts(loaded.model, result)})
            progress.close()
        distributed.barrier()
    distributed.barrier()
    distributed.shutdown_distributed()
    return results


def _require_truth(source: SampleSource, metric: str) -> None:
    """Refuse a metric that none of the first samples has the truth for, before a model is loaded."""
    faults = []
    for index in range(min(len(source), _SAMPLES_LOOKED_AT)):
        with contextlib.suppress(DataError):  # an unreadable one is counted and named when its turn comes
            sample = source.read(index)
            try:
                METRICS[metric]("", sample)
            except DataError as error:
                faults.append(error)
            else:
                return
    if faults:
        raise faults[0]


def _warn_of_no_images(sources: Mapping[Path, SampleSource]) -> None:
    """Say where a model that was trained to look is asked without pictures: a mistyped field of the data looks so."""
    from coconut.evaluation.interventions import has_images

    for path, source in sources.items():
        n_looked_at = min(len(source), _SAMPLES_LOOKED_AT)
        if not any(has_images(source, index) for index in range(n_looked_at)):
            logging.getLogger("coconut").warning(
                "%s: none of the first %d samples has an image, though the model sees images", path, n_looked_at
            )


def _sees_images(checkpoint: Path) -> bool:
    """Whether the model has a vision tower (text-only ones have no such configuration)."""
    return "vision_config" in _config(checkpoint)


def _shows_images(job: Job, image_root: Path | None) -> bool:
    """Whether as many of the samples have images as shuffling takes."""
    from coconut.data import open_dataset
    from coconut.evaluation.interventions import has_images

    source = open_dataset(job.data, image_root=image_root)
    n_samples = min(len(source), job.options.limit or sys.maxsize)
    having = (index for index in range(n_samples) if has_images(source, index))
    return len(list(islice(having, 2))) == 2


def require_room(checkpoint: Path, n_latents: int) -> None:
    """Raises ConfigError where so many thoughts alone are more tokens than the decoder reads."""
    config = _config(checkpoint)
    decoder = config.get("text_config") or config.get("llm_config") or config
    most: int = decoder.get("max_position_embeddings") or decoder.get("n_positions") or sys.maxsize
    if n_latents >= most:
        raise ConfigError(f"{n_latents} latents are more than fit: {checkpoint} reads {most} tokens at most")


def _config(checkpoint: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} has no config.json that can be read ({error})") from error
    return config


def _identity(checkpoint: Path, job: Job, source: ShardReader) -> dict[str, Any]:
    """What decides an evaluation's numbers: predictions of another one must not be taken for its own."""
    return {
        "checkpoint": _files(checkpoint),
        # Of a JSON file the folder is its cache, whose name stands for the images too: their paths, sizes and times.
        "data": [str(job.data.resolve()), len(source), source.directory.name, *_files(job.data)],
        "options": dataclasses.asdict(job.options),
    }


def require_evaluation_of(checkpoint: Path, folder: Path) -> None:
    """Raises DataError where an evaluation folder cannot be read, or says that it is of another checkpoint."""
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no evaluation that can be read ({error})") from error
    of = summary.get("checkpoint", checkpoint)  # the library's evaluate leaves it open
    is_same = Path(of).resolve() == checkpoint.resolve()
    if not is_same and summary.get("identity", {}).get("checkpoint") != _files(
        checkpoint
    ):  # nor is it there under another name
        raise DataError(f"{folder} is of {of}, not of {checkpoint}: evaluate that one for its card")


def _files(path: Path) -> list[list[str | int]]:
    """Name, size and time of change of a file, or of all files of a folder."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in found if p.is_file()]


def _kept(out: Path, identity: dict[str, Any], fresh: bool) -> EvaluationResult | None:
    """The result that `out` holds already, if it is of this very evaluation; `fresh` removes what is there."""
    if fresh:
        shutil.rmtree(out / ".partial", ignore_errors=True)
        return None
    try:
        summary = json.loads((out / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if summary.get("identity") != json.loads(json.dumps(identity)):
        return None
    logger = logging.getLogger("coconut")
    try:
        result = EvaluationResult.load(out)
    except DataError as error:
        logger.warning("%s: done now", error)
        return None
    logger.info("%s holds this evaluation already; --fresh asks anew", out)
    return result


def _facts(model: MultimodalCoconut, result: EvaluationResult) -> dict[str, Any]:
    """What a report wants to know besides the scores: where the model comes from, and what an answer costs."""
    import torch

    from coconut.evaluation.flops import generation_flops
    from coconut.utils.distributed import get_world_size

    config = model.base_model.config
    asked = [p for p in result.predictions if p.error is None]
    flops = [generation_flops(config, p.n_prompt_tokens, max(p.n_generated, 1), p.n_patches) for p in asked]
    return {
        "metadata": model.metadata,
        "flops_per_sample": sum(flops) / len(flops),
        "peak_memory_mb": _peak_memory_mb(),
        "machine": {
            "ranks": get_world_size(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "threads_per_rank": torch.get_num_threads(),
            "dtype": str(model.base_model.dtype).removeprefix("torch."),
        },
    }


def _forget_peak_memory() -> None:
    """Begin a job's peak at what is in use now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is the process's then
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the resident set's peak


def _peak_memory_mb() -> float:
    """Most memory of the main rank in this job: of the GPU's tensors, or of the whole process on a CPU."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # KiB on Linux


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
        if spec is not None:
            _ = int(spec["stage"]), int(spec["n_latents"])
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
