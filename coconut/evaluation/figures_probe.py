"""The probe's figures: what each change does to accuracy and likelihood, and the search of a graph as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coconut.evaluation.figures import Bar, Style, draw_bars, name_rows, panels, settings, to_png


def draw_causal(rows: Sequence[dict[str, Any]], style: Style) -> bytes:
    """Accuracy under each condition, beside the change in the answer's log-likelihood, each with its 95 % interval.

    Args:
        rows: of the causal table (`probe.effects`), the model's own thoughts first.
        style: of the page.
    """
    colours = {"own": 0, "image": 2}
    bars = []
    for row in rows:
        series = colours["own"] if row["name"] == "own" else colours.get(row["group"], 1)
        accuracy = row["accuracy"]
        bars.append(Bar(row["label"], accuracy["mean"], accuracy["low"], accuracy["high"], series))
    with settings(style):
        n = len(rows)
        if style.narrow:
            figure, (left, right) = panels(style, rows=2, height=2.0 + 0.86 * n)
        else:
            figure, (left, right) = panels(style, columns=2, height=1.2 + 0.42 * n, ratios=(1.35, 1))
        draw_bars(left, bars, {}, style)
        left.set_title("right answers")
        for place, (row, bar) in enumerate(zip(rows, bars, strict=True)):
            change = row["nats_change"]
            right.barh(place, change["mean"], height=0.56, color=style.series(bar.series))
            right.plot([change["low"], change["high"]], [place, place], color=style.ink, linewidth=1.3)
            text = "reference" if row["name"] == "own" else f"{change['mean']:+.1f}".replace("-", "\u2212")
            colour = style.faint if row["name"] == "own" else style.ink
            right.annotate(text, (min(change["low"], 0), place), (-6, 0), textcoords="offset points", va="center",
                           ha="right", fontweight="bold", color=colour)  # fmt: skip
        least = min((row["nats_change"]["low"] for row in rows), default=-1.0)
        most = max((row["nats_change"]["high"] for row in rows), default=0.0)
        right.set_xlim((1.7 if style.narrow else 1.3) * min(least, -0.1), max(most * 1.1, 0.02 * abs(least), 0.01))
        right.axvline(0, color=style.faint, linewidth=0.9)
        name_rows(right, [bar.label for bar in bars] if style.narrow else [""] * n)
        right.set_title("truth, change in nats" if style.narrow else "log-likelihood of the truth, change in nats")
        return to_png(figure)


def draw_frontier(example: dict[str, Any], style: Style) -> bytes:
    """One graph, once for each number of thoughts, its nodes as dark as the model holds them likely to go on from.

    Args:
        example: from `probe_graph.frontier`.
        style: of the page.
    """
    places = _tree(example)
    on_path = set(zip(example["path"], example["path"][1:], strict=False))
    n = len(example["shares"])
    depth = 1 + max(y for _, y in places.values())
    with settings(style):
        if style.narrow:
            figure, axes = panels(style, rows=n, height=0.7 * depth * n + 0.4)
        else:
            figure, axes = panels(style, columns=n, height=0.8 * depth + 0.6)
        for drawn, (k, shares) in zip(axes, example["shares"].items(), strict=True):
            drawn.set_title(f"after {k} thought{'s' if k != '1' else ''}")
            for node, kinds in example["kinds"].items():
                for kind in kinds if node in places else ():
                    told = (node, kind) in on_path
                    (x0, y0), (x1, y1) = places[node], places[kind]
                    colour, width = (style.series(0), 2.2) if told else (style.grid, 1.2)
                    drawn.plot([x0, x1], [-y0, -y1], zorder=1, color=colour, linewidth=width)
            for node, (x, y) in places.items():
                share = shares.get(node, 0.0)
                box = {"boxstyle": "round,pad=0.3", "edgecolor": style.series(0) if share >= 0.005 else style.grid}
                fill = {"facecolor": _mix(style.paper, style.series(0), share)}
                text = f"{node}\n{share:.0%}" if node in shares else node
                ink = style.paper if share > 0.55 and not style.dark else style.ink
                weight = "bold" if node == example["answer"] else "normal"
                drawn.text(x, -y, text, ha="center", va="center", fontsize=8, color=ink, fontweight=weight,
                           bbox=box | fill, zorder=2)  # fmt: skip
            drawn.set_xlim(-0.62, 0.62)
            drawn.set_ylim(-depth + 0.45, 0.45)
            drawn.set_axis_off()
        return to_png(figure)


def _tree(example: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Where each node that can be reached stands: sideways in -0.5 .. 0.5, and its least number of edges downwards."""
    places: dict[str, tuple[float, int]] = {}
    for depth, layer in enumerate(example["layers"]):
        new = [name for name in layer if name not in places]
        for number, name in enumerate(new):
            places[name] = ((number + 0.5) / len(new) - 0.5, depth)
    return places


def _mix(paper: str, colour: str, share: float) -> tuple[float, ...]:
    ends = [[int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)] for text in (paper, colour)]
    return tuple(a + (b - a) * min(max(share, 0.0), 1.0) for a, b in zip(*ends, strict=True))
