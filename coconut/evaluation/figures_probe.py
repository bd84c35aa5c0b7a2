"""The probe's figure: what each change does to accuracy, and to the likelihood of the true answer."""

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
