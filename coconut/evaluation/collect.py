"""What a report is made of: run folders and evaluation folders, read from disk and put in order.

RUN/metrics.jsonl, config.yaml          -> Run         curves, configuration, cost of training
EVAL/summary.json, predictions.jsonl    -> Evaluation  one model, one data set, one way of asking
evaluations of one name                 -> Method      "Coconut": test, images shuffled, noise, other data; seeds
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from coconut.evaluation.result import PREDICTIONS_FILE, SUMMARY_FILE
from coconut.types import STAGED_METHODS, DataError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
#: A file with "floors" beside the data is small; anything larger is data.
_MAX_FACTS_BYTES = 1_000_000
#: Where a run that starts anew in the same folder moves what was there (`coconut.training.run_folder.set_aside`).
_SET_ASIDE = re.compile(r"old-\d+")
_METHOD_NAMES = {
    "coconut": "Coconut",
    "cot": "CoT",
    "no_cot": "no-CoT",
    "icot": "iCoT",
    "pause": "pause",
    "pause_as_thought": "pause as thought",
    "pause_multipass": "pause in passes",
    "no_curriculum": "no curriculum",
    "no_thought": "no thought",
}


@dataclass(frozen=True)
class Run:
    """One training run: the rows of its metrics and the configuration it ran with."""

    name: str
    folder: Path
    rows: tuple[dict[str, Any], ...]
    config_text: str = ""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("kind") == kind]

    @property
    def stage_bounds(self) -> list[tuple[int, int, int]]:
        """(stage, first step, last step) of each stage, in order."""
        bounds: dict[int, tuple[int, int]] = {}
        end = 0
        for row in self.rows:
            stage, step = row["stage"], row["step"]
            first, _ = bounds.get(stage, (end, step))
            bounds[stage] = (first, max(step, end))
            end = max(step, end)
        return [(stage, first, last) for stage, (first, last) in bounds.items()]


@dataclass(frozen=True)
class Evaluation:
    """One folder that `EvaluationResult.save` wrote."""

    method: str
    folder: Path
    summary: dict[str, Any]

    @property
    def data(self) -> Path:
        return Path(self.summary.get("data", "data"))

    @property
    def checkpoint(self) -> Path:
        return Path(self.summary.get("checkpoint", self.folder))

    @property
    def changes(self) -> tuple[str, ...]:
        """What was changed about the questions; empty for a plain evaluation."""
        options = self.summary["options"]
        changed = ["images shuffled"] if options["shuffle_images"] else []
        if options.get("latents") is not None:
            changed.append(f"{options['latents']} thought{'s' * (options['latents'] != 1)}")
        return (*changed, *([f"{options['thoughts']} for thoughts"] if options["thoughts"] != "own" else []))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the checkpoint's run, as far as it tells."""
        return (self.summary.get("metadata") or {}).get("config") or {}

    @property
    def cost(self) -> dict[str, float]:
        """Samples, steps and FLOPs of training up to this checkpoint, as far as it tells."""
        state = (self.summary.get("metadata") or {}).get("state") or {}
        names = {"samples": "samples", "steps": "step", "flops": "flops"}
        return {name: state[key] for name, key in names.items() if state.get(key) is not None}

    @property
    def seed(self) -> str:
        """What tells this model from others of the same method: its seed, or else its run folder."""
        return f"seed {self.config['seed']}" if "seed" in self.config else self.checkpoint.parent.name

    def predictions(self) -> list[dict[str, Any]]:
        """All rows of predictions.jsonl, in the order of the data."""
        return read_jsonl(self.folder / PREDICTIONS_FILE)


@dataclass
class Method:
    """All evaluations under one name, by what was changed: "" is the plain one."""

    name: str
    variants: dict[str, list[Evaluation]] = field(default_factory=dict)

    @property
    def plain(self) -> list[Evaluation]:
        """The evaluations that the table and the figures rank by: plain ones, or else the first there are."""
        return self.variants.get("") or next(iter(self.variants.values()))


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run folder; without a name, the run is called after its method, or else after its folder.

    Raises:
        DataError: it holds no metrics.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{folder} is no run folder: it has no {METRICS_FILE}")
    rows = tuple(row for row in read_jsonl(path) if "step" in row and "stage" in row)
    config = folder / CONFIG_FILE
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return Run(name or _METHOD_NAMES.get(_method_in(text), folder.name), folder, rows, text)


def _method_in(config_text: str) -> str:
    try:
        values = yaml.safe_load(config_text)
    except yaml.YAMLError:
        return ""
    return str(values.get("method", "")) if isinstance(values, dict) else ""


def read_evaluation(folder: Path, name: str | None = None) -> Evaluation:
    """Read an evaluation folder; without a name, the method is told from the stage it was asked at.

    Raises:
        DataError: it holds no complete evaluation.
    """
    path = folder / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        spec = summary["stage_spec"]
        _ = summary["options"]["thoughts"], summary["accuracy"]
    except OSError:
        raise DataError(f"{folder} is no evaluation folder: it has no {SUMMARY_FILE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); evaluate again") from error
    return Evaluation(name or method_name(spec), folder, summary)


def method_name(spec: dict[str, Any]) -> str:
    """The usual name of what a stage asks for: written steps, none, or thoughts."""
    if spec.get("method") in _METHOD_NAMES and (spec["stage"] or spec["method"] not in STAGED_METHODS):
        return _METHOD_NAMES[spec["method"]]
    if spec["n_latents"]:
        return _METHOD_NAMES["coconut"]
    return _METHOD_NAMES["no_cot" if spec["n_skip_steps"] is None else "cot"]


def name_stages(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Tell checkpoints of several latent stages apart by name; that of the last stage is the method itself.

    The last stage is the one that the checkpoint's configuration names, or else the last that was evaluated.
    """
    coconut = _METHOD_NAMES["coconut"]
    latest = max((e.summary["stage_spec"]["stage"] for e in evaluations), default=0)

    def named(evaluation: Evaluation) -> Evaluation:
        stage = evaluation.summary["stage_spec"]["stage"]
        if evaluation.method != coconut or stage >= evaluation.config.get("max_latent_stage", latest):
            return evaluation
        return replace(evaluation, method=f"{coconut}, stage {stage}")

    return [named(evaluation) for evaluation in evaluations]


def find_runs(folder: Path) -> list[Path]:
    """Run folders at or anywhere below a folder, by name; without those that a restart has moved aside."""
    return sorted(path.parent for path in folder.rglob(METRICS_FILE) if not _is_set_aside(path.parent, folder))


def find_evaluations(folder: Path) -> list[Path]:
    """Evaluation folders at or anywhere below a folder, by name; without those of models moved aside."""
    found = (path.parent for path in folder.rglob(SUMMARY_FILE) if (path.parent / PREDICTIONS_FILE).is_file())
    return sorted(path for path in found if not _is_set_aside(path, folder))


def _is_set_aside(path: Path, asked_for: Path) -> bool:
    """Whether `path` lies in RUN/old-N of a run folder, unless that is what was asked for."""
    between = [other for other in (path, *path.parents) if other != asked_for and other.is_relative_to(asked_for)]
    return any(_SET_ASIDE.fullmatch(other.name) and (other.parent / CONFIG_FILE).is_file() for other in between)


def group_methods(evaluations: Sequence[Evaluation]) -> list[Method]:
    """Evaluations by method and by what was changed, both in the order in which they first come.

    The data set that most plain evaluations share is the ordinary one; any other is named as a change. The same
    checkpoint asked twice in the same way counts once: the later replaces the earlier.
    """
    plain = Counter(e.data.stem for e in evaluations if not e.changes) or Counter(e.data.stem for e in evaluations)
    usual = plain.most_common(1)[0][0] if plain else ""
    methods: dict[str, Method] = {}
    for evaluation in evaluations:
        other_data = [] if evaluation.data.stem == usual else [f"on {evaluation.data.stem}"]
        label = ", ".join([*evaluation.changes, *other_data])
        variants = methods.setdefault(evaluation.method, Method(evaluation.method)).variants
        same = [e for e in variants.get(label, []) if e.checkpoint != evaluation.checkpoint]
        variants[label] = [*same, evaluation]
    for method in methods.values():
        # As it is, then other pictures, other thoughts, and last other data.
        method.variants = dict(sorted(method.variants.items(), key=lambda item: ("on " in item[0], item[0])))
    return list(methods.values())


def read_floors(evaluations: Iterable[Evaluation]) -> dict[str, float]:
    """Scores that take no skill, as a small JSON file beside the data states them under "floors"."""
    for folder in dict.fromkeys(parent for e in evaluations for parent in list(e.data.parents)[:2]):
        for path in sorted(folder.glob("*.json")):
            if path.stat().st_size > _MAX_FACTS_BYTES:
                continue
            try:
                floors = json.loads(path.read_text(encoding="utf-8"))["floors"]
                return {floor_name(name): float(value) for name, value in floors.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # some other JSON file
    return {}


def floor_name(name: str) -> str:
    """A floor is a guess from part of what is seen, unless it is chance itself."""
    return name if "chance" in name else f"look-up from {name}"


def spread(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, sample standard deviation, minimum, maximum; the deviation of a single value is 0."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0, min(values), max(values)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file.

    Raises:
        DataError: naming the line that is no JSON object. A last line without its line break is being written, or was
            cut off by a kill, and is left out.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number} is no JSON object")
        rows.append(row)
    return rows
