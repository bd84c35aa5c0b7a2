"""The report's figures, drawn from plain numbers: curves of a run, methods beside each other, what changes do to them.

Each is drawn for a light and a dark page, and for a wide and a narrow screen: one picture scaled down to a phone has
letters nobody can read.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]

#: Colours of methods in their order; told apart without red and green, on light and on dark.
LIGHT_SERIES = (
    "#0f766e",
    "#3b5bdb",
    "#c2571a",
    "#8b3fa8",
    "#8a6d00",
    "#5b6470",
    "#b02a6f",
    "#3f6f1f",
    "#6b4423",
    "#0b6fa4",
)
DARK_SERIES = (
    "#3cc4b4",
    "#91a7ff",
    "#f0955b",
    "#cf8fe6",
    "#e0bd3f",
    "#aab2bd",
    "#f783ac",
    "#a9d46f",
    "#c79a72",
    "#66c2ee",
)
_DPI = 160


@dataclass(frozen=True)
class Style:
    """How a figure looks: colours of the page, and its width in inches."""

    dark: bool = False
    narrow: bool = False

    @property
    def width(self) -> float:
        return 4.4 if self.narrow else 9.6

    @property
    def ink(self) -> str:
        return "#e8e6e1" if self.dark else "#1d2126"

    @property
    def faint(self) -> str:
        return "#9aa1ab" if self.dark else "#5f6670"

    @property
    def grid(self) -> str:
        return "#343a42" if self.dark else "#e4e1da"

    @property
    def paper(self) -> str:
        return "#1b1f24" if self.dark else "#ffffff"

    def series(self, index: int) -> str:
        colours = DARK_SERIES if self.dark else LIGHT_SERIES
        return colours[index % len(colours)]


LIGHT_WIDE = Style()
#: Every kind of screen and the media query that chooses it, the first that fits; the last needs none.
SCREENS = {
    Style(dark=True, narrow=True): "(max-width:640px) and (prefers-color-scheme:dark)",
    Style(narrow=True): "(max-width:640px)",
    Style(dark=True): "(prefers-color-scheme:dark)",
    LIGHT_WIDE: "",
}


@dataclass(frozen=True)
class Bar:
    """A measured share with its interval, under a label, in the colour of a series."""

    label: str
    value: float
    low: float
    high: float
    series: int
    latents: float = 0.0  # sequential passes: thoughts, and generated tokens
    tokens: float = 0.0


@dataclass(frozen=True)
class Curve:
    """What a run measured while it trained."""

    steps: Sequence[float]  # of the losses
    losses: Sequence[float]
    look_steps: Sequence[float]  # of the looks at validation data
    accuracies: Sequence[float]
    full_matches: Sequence[float]
    bounds: Sequence[tuple[int, int, int]]  # stage, first step, last step


def draw_training(curves: Sequence[Curve], series: int, style: Style) -> bytes:
    """Loss and validation scores over optimizer steps; the stages as bands when there is one run."""
    with settings(style):
        figure, (top, bottom) = panels(style, rows=2, height=5.4 if style.narrow else 4.8, share_x=True)
        colour = style.series(series)
        for curve in curves:
            if len(curves) == 1:
                for axes in (top, bottom):
                    _shade_stages(axes, curve.bounds, style, labelled=axes is top)
                top.plot(curve.steps, curve.losses, color=colour, alpha=0.3, linewidth=0.8)
            for _, first, last in curve.bounds:
                _plot_stage(top, bottom, curve, (first, last), colour, style, thin=len(curves) > 1)
        losses = [loss for curve in curves for loss in curve.losses]
        if losses and 0 < 20 * min(losses) < max(losses):
            top.set_yscale("log")  # a curriculum's losses span three orders of magnitude
        top.set_ylabel("training loss")
        bottom.set_ylim(-0.03, 1.05)
        bottom.yaxis.set_major_formatter(FuncFormatter(percent_tick))
        bottom.set_ylabel("validation, right")
        bottom.set_xlabel("optimizer steps")
        bottom.xaxis.set_major_locator(MaxNLocator(4 if style.narrow else 8, integer=True))
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        handles = [
            Line2D([], [], color=colour, marker="o", markersize=3.2, label="whole text"),
            Line2D([], [], color=style.faint, linestyle="--", linewidth=1.1, label="answer alone"),
        ]
        bottom.legend(
            handles=handles, loc="lower right", fontsize=8.5, facecolor=style.paper, edgecolor="none", framealpha=0.8
        )
        return to_png(figure)


def draw_methods(bars: Sequence[Bar], floors: dict[str, float], whiskers: str, style: Style) -> bytes:
    """Accuracy of each method, beside the sequential forward passes an answer takes.

    Args:
        bars: one a method.
        floors: scores that take no skill, drawn as dotted lines.
        whiskers: what low and high of the bars are.
        style: of the page.
    """
    with settings(style):
        n = len(bars)
        if style.narrow:
            figure, (left, right) = panels(style, rows=2, height=1.9 + 1.0 * n)
        else:
            figure, (left, right) = panels(style, columns=2, height=1.5 + 0.62 * n, ratios=(1.25, 1))
        draw_bars(left, bars, floors, style)
        left.set_title(f"accuracy, with {whiskers}")
        for row, bar in enumerate(bars):
            colour = style.series(bar.series)
            right.barh(
                row, bar.latents, height=0.56, color=colour, alpha=0.45, hatch="///", edgecolor=style.paper, linewidth=0
            )
            right.barh(row, bar.tokens, left=bar.latents, height=0.56, color=colour)
            parts = [f"{bar.latents:.3g} latent"] if bar.latents else []  # thoughts, or pauses read one by one
            parts.append(f"{bar.tokens:.3g} token{'s' * (bar.tokens != 1)}")
            end = (bar.latents + bar.tokens, row)
            right.annotate(" + ".join(parts), end, (5, 0), textcoords="offset points", va="center")
        longest = max((bar.latents + bar.tokens for bar in bars), default=1)
        right.set_xlim(0, longest * (1.75 if style.narrow else 1.6))
        right.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        name_rows(right, [bar.label for bar in bars] if style.narrow else [""] * n)
        right.set_title("sequential forward passes an answer")
        name_floors(figure, floors, style)
        return to_png(figure)


def draw_changes(groups: Sequence[tuple[str, Sequence[Bar]]], floors: dict[str, float], style: Style) -> bytes:
    """For each method, its accuracy as it is and with pictures, thoughts or data changed."""
    with settings(style):
        bars = [bar for _, group in groups for bar in group]
        positions, titles, row = [], [], 0.0
        for name, group in groups:
            titles.append((row - 0.75, name, group[0].series))
            positions += [row + i for i in range(len(group))]
            row += len(group) + 1.0
        figure, (axes,) = panels(style, height=1.2 + 0.36 * row)
        draw_bars(axes, bars, floors, style, positions=positions)
        for position, name, series in titles:
            axes.annotate(
                *(name, (0, position)),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                color=style.series(series),
                fontweight="bold",
                va="center",
            )
        axes.set_ylim(row - 1.2, -1.2)
        name_floors(figure, floors, style)
        return to_png(figure)


def draw_bars(
    axes: Axes, bars: Sequence[Bar], floors: dict[str, float], style: Style, positions: Sequence[float] | None = None
) -> None:
    places = list(positions) if positions is not None else list(range(len(bars)))
    for value in floors.values():
        axes.axvline(value, color=style.faint, linewidth=0.9, linestyle=(0, (2, 3)), zorder=0)
    for place, bar in zip(places, bars, strict=True):
        axes.barh(place, bar.value, height=0.56, color=style.series(bar.series), alpha=1.0 if bar.value else 0.5)
        axes.plot([bar.low, bar.high], [place, place], color=style.ink, linewidth=1.3, solid_capstyle="butt")
        for end in (bar.low, bar.high):
            axes.plot([end, end], [place - 0.12, place + 0.12], color=style.ink, linewidth=1.3)
        axes.annotate(f"{bar.value:.1%}".replace("%", "\u202f%"), (max(bar.high, bar.value), place), (6, 0),
                      textcoords="offset points", va="center", fontweight="bold",
                      bbox={"facecolor": style.paper, "edgecolor": "none", "pad": 1.2, "alpha": 0.85})  # fmt: skip
    axes.set_xlim(0, 1.24 if style.narrow else 1.16)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(FuncFormatter(percent_tick))
    name_rows(axes, [bar.label for bar in bars], places)


def name_rows(axes: Axes, labels: Sequence[str], positions: Sequence[float] | None = None) -> None:
    axes.set_yticks(list(positions) if positions is not None else range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["bottom"].set_visible(False)


def _shade_stages(axes: Axes, bounds: Sequence[tuple[int, int, int]], style: Style, labelled: bool) -> None:
    for number, (stage, first, last) in enumerate(bounds):
        if number % 2:
            axes.axvspan(first, last, color=style.grid, alpha=0.55, linewidth=0, zorder=0)
        if labelled and len(bounds) > 1:
            text = str(stage) if number or style.narrow else f"stage {stage}"
            axes.annotate(text, ((first + last) / 2, 1.0), (0, 3), xycoords=("data", "axes fraction"),
                          textcoords="offset points", ha="center", color=style.faint, fontsize=9)  # fmt: skip
    if bounds:
        axes.set_xlim(bounds[0][1], max(bounds[-1][2], bounds[0][1] + 1))


def _plot_stage(
    top: Axes, bottom: Axes, curve: Curve, span: tuple[int, int], colour: str, style: Style, thin: bool
) -> None:
    """One stage's curves on their own: a line across a boundary would join scores of different tasks."""
    steps, losses = _within(span, curve.steps, curve.losses)
    top.plot(steps, _smooth(losses), color=colour, linewidth=1.0 if thin else 1.7, alpha=0.7 if thin else 1.0)
    looks, answers = _within(span, curve.look_steps, curve.accuracies)
    looks, texts = _within(span, curve.look_steps, curve.full_matches)
    bottom.plot(looks, answers, color=style.faint, linestyle="--", linewidth=1.1, alpha=0.4 if thin else 1.0)
    bottom.plot(looks, texts, color=colour, marker="o", markersize=2 if thin else 3.2, alpha=0.7 if thin else 1.0)


def _within(span: tuple[int, int], steps: Sequence[float], values: Sequence[float]) -> tuple[Array, Array]:
    steps_N, values_N = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    inside_N = (steps_N > span[0]) & (steps_N <= span[1])
    return steps_N[inside_N], values_N[inside_N]


def _smooth(values: Array) -> Array:
    """Running mean over a fortieth of the points to either side."""
    half = max(1, len(values) // 40)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def name_floors(figure: Figure, floors: dict[str, float], style: Style) -> None:
    if floors:
        text = "Dotted: " + ", ".join(f"{name} {value:.1%}".replace("%", "\u202f%") for name, value in floors.items())
        lines = textwrap.wrap(text, 66 if style.narrow else 150)
        figure.supxlabel("\n".join(lines), fontsize=8.5, color=style.faint, x=0.01, ha="left", linespacing=1.35)


def percent_tick(share: float, _: Any = None) -> str:
    return f"{share:.0%}".replace("%", "\u202f%")


def settings(style: Style) -> Any:
    return mpl.rc_context(
        {
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.titlecolor": style.faint,
            "axes.labelsize": 9.5,
            "axes.labelcolor": style.faint,
            "axes.edgecolor": style.grid,
            "axes.facecolor": style.paper,
            "figure.facecolor": style.paper,
            "text.color": style.ink,
            "xtick.color": style.faint,
            "ytick.color": style.faint,
            "ytick.labelcolor": style.ink,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": style.grid,
            "grid.linewidth": 0.8,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "hatch.linewidth": 1.6,
        }
    )


def panels(
    style: Style,
    rows: int = 1,
    columns: int = 1,
    height: float = 3.0,
    share_x: bool = False,
    ratios: tuple[float, ...] | None = None,
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(style.width, height), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x, width_ratios=ratios)
    return figure, list(grid.flat)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file; without date and version, so that the same numbers give the same file."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A page holds each figure four times; a palette makes them a third of the size.
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128)
    buffer = io.BytesIO()
    drawn.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
