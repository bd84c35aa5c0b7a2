"""From run and evaluation folders to a page: index.html, which holds all it shows, and its figures as PNG files.

collect -> rows and bars -> figures (PNG) -> page (HTML)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from coconut.evaluation import figures, tables
from coconut.evaluation.collect import Evaluation, Method, Run, group_methods, read_floors
from coconut.evaluation.examples import examples
from coconut.evaluation.page import data_uri, render
from coconut.evaluation.run_table import stages_tables
from coconut.evaluation.tables import interval_of, mean_of
from coconut.evaluation.wording import count, duration, percent
from coconut.types import DataError


@dataclass
class Report:
    """What a page is made of, and how it is put together.

    Attributes:
        title: of the page.
        runs: training runs; those of one name share a figure.
        evaluations: of any models on any data.
        floors: scores that take no skill, by name; None takes what stands beside the data.
        times: seconds of each part of a demo, by name.
    """

    title: str
    runs: Sequence[Run] = ()
    evaluations: Sequence[Evaluation] = ()
    floors: dict[str, float] | None = None
    times: dict[str, float] | None = None
    _drawn: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, out: Path) -> Path:
        """Write figures and page into a folder; returns the page's path.

        Raises:
            DataError: there is nothing to report.
        """
        if not self.runs and not self.evaluations:
            raise DataError("there is nothing to report: no run with metrics and no evaluation was given")
        out.mkdir(parents=True, exist_ok=True)
        methods = group_methods(self.evaluations)
        floors = read_floors(self.evaluations) if self.floors is None else self.floors
        series = {
            name: i for i, name in enumerate(dict.fromkeys([*(m.name for m in methods), *(r.name for r in self.runs)]))
        }
        context = {
            "title": self.title,
            "lead": tables.lead_sentences(methods),
            "tiles": tables.headline_tiles(methods),
            "floors": [{"name": name, "value": percent(value)} for name, value in floors.items()],
            "methods": self._methods(methods, floors, series, out),
            "changes": self._changes(methods, floors, series, out),
            "seeds": tables.seeds_table(methods),
            "training": self._training(series, out),
            "stages": stages_tables(self.runs),
            "examples": examples(methods),
            "times": tables.times_list(self.times),
            "machine": tables.machine_lines(self.evaluations),
            "configs": [{"name": run.name, "text": run.config_text} for run in self.runs if run.config_text],
            "footer": "Written by launch/report.py. The figures lie beside this page as PNG files.",
            "figures": self._drawn,
        }
        page = out / "index.html"
        unfinished = page.with_suffix(".tmp")
        unfinished.write_text(render(context), encoding="utf-8")
        unfinished.replace(page)
        return page

    def _draw(self, name: str, alt: str, out: Path, draw: Callable[[figures.Style], bytes]) -> None:
        """Draw a figure for every kind of screen; the one for a wide, light one is the file."""
        drawn = {style: draw(style) for style in figures.SCREENS}
        (out / f"{name}.png").write_bytes(drawn[figures.LIGHT_WIDE])
        sources = [(query, data_uri(drawn[style])) for style, query in figures.SCREENS.items() if query]
        self._drawn[name] = {"sources": sources, "fallback": data_uri(drawn[figures.LIGHT_WIDE]), "alt": alt}

    def _methods(
        self, methods: list[Method], floors: dict[str, float], series: dict[str, int], out: Path
    ) -> dict[str, Any] | None:
        if not methods:
            return None
        bars = [_bar(method.plain, method.name, series[method.name]) for method in methods]
        several = any(len(method.plain) > 1 for method in methods)
        whiskers = "least and greatest of the runs" if several else "95 % interval"
        alt = "; ".join(f"{bar.label}: {percent(bar.value)}, {bar.latents + bar.tokens:.3g} passes" for bar in bars)
        self._draw("methods", alt, out, lambda style: figures.draw_methods(bars, floors, whiskers, style))
        return tables.methods_table(methods)

    def _changes(
        self, methods: list[Method], floors: dict[str, float], series: dict[str, int], out: Path
    ) -> dict[str, Any] | None:
        groups = [
            (m.name, [_bar(variant, label or "as it is", series[m.name]) for label, variant in m.variants.items()])
            for m in methods
            if len(m.variants) > 1
        ]
        if not groups:
            return None
        alt = "; ".join(f"{name}, {bar.label}: {percent(bar.value)}" for name, bars in groups for bar in bars)
        self._draw("changes", alt, out, lambda style: figures.draw_changes(groups, floors, style))
        intro = (
            "A model that reads the picture must fall to chance when a question is shown another one's picture. "
            "Thoughts that carry the reasoning cannot be replaced by random vectors of the same length; where accuracy "
            "stays, they do not carry it. Rows with “on” are other data sets."
        )
        return {"intro": intro}

    def _training(self, series: dict[str, int], out: Path) -> list[dict[str, str]]:
        shown: list[dict[str, str]] = []
        for name in dict.fromkeys(run.name for run in self.runs):
            runs = [run for run in self.runs if run.name == name and run.rows]
            if not runs:
                continue
            curves = [_curve(run) for run in runs]
            figure = "training" if not shown else f"training_{_file_name(name)}"
            last = runs[0].rows[-1]
            alt = f"training loss and validation scores of {name} over {last['step']} steps"
            index = series[name]
            self._draw(figure, alt, out, partial(figures.draw_training, curves, index))
            text = f"{len(runs)} runs." if len(runs) > 1 else _caption(runs[0])
            shown.append({"figure": figure, "caption": f"{name}. {text}"})
        return shown


def _bar(evaluations: Sequence[Evaluation], label: str, series: int) -> figures.Bar:
    low, high = interval_of(evaluations)
    passes, tokens = mean_of(evaluations, "mean_forward_passes"), mean_of(evaluations, "mean_generated_tokens")
    return figures.Bar(label, mean_of(evaluations, "accuracy"), low, high, series, passes - tokens, tokens)


def _curve(run: Run) -> figures.Curve:
    losses = [row for row in run.of_kind("train") if row.get("loss") is not None]
    looks = [row for row in run.of_kind("val") if row.get("accuracy") is not None]
    return figures.Curve(
        steps=[row["step"] for row in losses],
        losses=[row["loss"] for row in losses],
        look_steps=[row["step"] for row in looks],
        accuracies=[row["accuracy"] for row in looks],
        full_matches=[row.get("full_match", row["accuracy"]) for row in looks],
        bounds=run.stage_bounds,
    )


def _caption(run: Run) -> str:
    last = run.rows[-1]
    parts = [f"{count(last['step'])} optimizer steps"]
    if last.get("samples"):
        parts.append(f"{count(last['samples'])} samples")
    if last.get("flops"):
        parts.append(f"{count(last['flops'])} FLOPs")
    if last.get("seconds"):
        parts.append(f"{duration(last['seconds'])} of training steps")
    return ", ".join(parts) + "."


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).lower()


def find_times(folders: Sequence[Path]) -> Path | None:
    """The file of times in these folders, when there is just one."""
    found = {path.resolve() for folder in folders for path in folder.glob("*times.json")}
    return found.pop() if len(found) == 1 else None


def read_times(path: Path) -> dict[str, float]:
    """Seconds by part, from a JSON file that a demo wrote.

    Raises:
        DataError: it is not of that form.
    """
    try:
        return {str(name): float(seconds) for name, seconds in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no times, seconds by part: {error}") from error
