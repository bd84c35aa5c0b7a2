"""A preview for people: one HTML page that needs no other file, and the same as text for a terminal."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coconut.data.shard_inspect import contact_sheet
from coconut.evaluation.page import data_uri, render
from coconut.training.preview import KINDS, PreviewBatch, PreviewRow
from coconut.training.preview_stats import Histogram, KindOfPlan

_TILE = 224  # pixels of a tile's side on the page, at most
_SHEET = 900  # pixels of a picture's width, about
#: What each kind of token is, for the legend.
MEANINGS = {
    "prompt": "read, not asked for",
    "image": "image tokens, replaced by what the vision tower makes of a tile",
    "marker": "begin and end of the thoughts",
    "latent": "thoughts: the last hidden state, fed back",
    "label": "asked for: the loss is taken here",
    "padding": "padding, not attended to",
}
_ANSI = {"prompt": "", "image": "35", "marker": "33", "latent": "1;33", "label": "32", "padding": "2"}


def write_preview(
    folder: Path,
    title: str,
    batches: Sequence[PreviewBatch],
    histograms: Sequence[Histogram] = (),
    balances: Sequence[KindOfPlan] = (),
    ranks: int = 1,
) -> Path:
    """Write FOLDER/index.html."""
    context = {
        "title": title,
        "legend": [{"kind": kind, "meaning": meaning} for kind, meaning in MEANINGS.items()],
        "batches": [_batch(batch) for batch in batches],
        "histograms": [_chart(histogram) for histogram in histograms],
        "balances": [_balance_row(plan) for plan in balances],
        "ranks": ranks,
    }
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    unfinished = page.with_suffix(".tmp")
    unfinished.write_text(render(context, "preview"), encoding="utf-8")
    unfinished.replace(page)
    return page


def batch_facts(batch: PreviewBatch) -> list[tuple[str, str]]:
    """A micro-batch's size and cost, as value and label."""
    return [
        (f"{batch.n_rows} × {batch.columns}", "rows × columns"),
        (f"{batch.n_patches}", "tiles"),
        (f"{batch.n_tokens:,}", "tokens"),
        (f"{batch.n_labels:,}", "label tokens"),
        (f"{batch.padding:.1%}", "padding"),
        (f"{batch.passes}", "decoder passes"),
        (flops(batch.flops), "a training step of it"),
    ]


def row_facts(row: PreviewRow) -> list[tuple[str, str]]:
    """A row's size and cost, as label and value."""
    tiles = [len(one) for one in row.tiles]
    sizes = ", ".join(
        f"{width} × {height} px: {n} {'tile' if n == 1 else 'tiles'}"
        for (width, height), n in zip(row.image_sizes, tiles, strict=True)
    )
    return [
        ("images", sizes or "none"),
        ("tokens", f"{row.length:,} ({row.count('image'):,} of images)"),
        ("thoughts", f"{row.count('latent')} for {row.steps_gone} of {len(row.sample.steps)} steps"),
        ("label tokens", f"{row.count('label'):,}"),
        ("planned cost", f"{row.planned_cost:,.0f} tokens"),
    ]


def flops(value: float) -> str:
    """Operations with a unit that leaves few digits."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1e6:.1f} MFLOP"


# -- the page --


def _batch(batch: PreviewBatch) -> dict[str, Any]:
    facts = [{"value": value, "label": label} for value, label in batch_facts(batch)]
    shown = "" if len(batch.rows) == batch.n_rows else f", the first {len(batch.rows)} rows"
    return {
        "name": f"Step {batch.step}, micro-batch {batch.slot}{shown}",
        "facts": facts,
        "rows": [_row(row) for row in batch.rows],
    }


def _row(row: PreviewRow) -> dict[str, Any]:
    return {
        "key": row.key,
        "stage": row.stage,
        "facts": row_facts(row),
        "pictures": [
            {
                "source": _picture(row, number),
                "width": min(_TILE * (row.grids[number][0] + (len(row.tiles[number]) > 1)), _SHEET),
                "alt": f"tiles of image {number + 1}",
            }
            for number in range(len(row.tiles))
        ],
        "spans": [
            {"kind": span.kind, "text": span_text(span.kind, span.text, span.tokens), "tokens": span.tokens}
            for span in row.spans
        ],
        "question": row.sample.question,
        "steps": [{"text": step, "gone": n < row.steps_gone} for n, step in enumerate(row.sample.steps)],
        "answer": row.sample.answer,
    }


def _picture(row: PreviewRow, number: int) -> str:
    grid = row.grids[number]
    sheet = contact_sheet(row.tiles[number], grid, tile=min(_TILE, _SHEET // (grid[0] + 1)))
    file = io.BytesIO()
    # Photographs as JPEG, a tenth of the bytes; small pictures as they are.
    is_large = sheet.width * sheet.height > 300_000
    sheet.save(file, "JPEG" if is_large else "PNG", **({"quality": 88} if is_large else {"optimize": True}))
    return data_uri(file.getvalue(), "image/jpeg" if is_large else "image/png")


def span_text(kind: str, text: str, tokens: int) -> str:
    """A span as it is written: words, or what stands for tokens without words."""
    if kind == "latent":
        return f"thought × {tokens}"
    if kind == "image":
        return f"image token × {tokens}"
    if kind == "padding":
        return f"padding × {tokens}"
    return text.replace("\n", "↵\n")


def _chart(histogram: Histogram) -> dict[str, Any]:
    top = max(histogram.counts)
    bars = [
        {
            "height": 100 * count / top,
            "note": f"{_number(low)} to {_number(high)}: {count:,} samples",
        }
        for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    ]
    return {
        "name": histogram.name,
        "bars": bars,
        "low": _number(max(histogram.edges[0], 0)),
        "high": _number(histogram.largest),
        "facts": histogram_facts(histogram),
    }


def histogram_facts(histogram: Histogram) -> str:
    return (
        f"mean {_number(histogram.mean)}, median {_number(histogram.median)}, 95 % at most {_number(histogram.p95)}, "
        f"largest {_number(histogram.largest)}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


BALANCE_HEAD = ("balance", "max/mean cost", "95 % at most", "padding", "samples", "steps an epoch")


def balance_cells(plan: KindOfPlan) -> tuple[str, ...]:
    """A plan's numbers, under `BALANCE_HEAD`."""
    return (
        plan.name + (" (this run)" if plan.is_used else ""),
        f"{plan.balance.cost_mean:.3f}",
        f"{plan.balance.cost_p95:.3f}",
        f"{plan.balance.padding:.1%}",
        f"{plan.balance.samples:.1f}",
        f"{plan.steps:,}",
    )


def _balance_row(plan: KindOfPlan) -> dict[str, Any]:
    name, *cells = balance_cells(plan)
    pairs = [{"head": head, "value": cell} for head, cell in zip(BALANCE_HEAD[1:], cells, strict=True)]
    return {"name": name, "cells": pairs, "is_used": plan.is_used}


# -- the terminal --


def terminal_text(batches: Sequence[PreviewBatch], *, colour: bool, width: int = 100) -> str:
    """The same as text; without colour, kinds of tokens stand in brackets of their own."""
    lines = []
    for batch in batches:
        facts = ", ".join(f"{label} {value}" for value, label in batch_facts(batch))
        lines += ["", *textwrap.wrap(f"step {batch.step}, micro-batch {batch.slot}: {facts}", width)]
        for row in batch.rows:
            lines += ["", f"{row.key}  (stage {row.stage})"]
            lines += ["  " + ", ".join(f"{label}: {value}" for label, value in row_facts(row))]
            text = "".join(_terminal_span(span.kind, span.text, span.tokens, colour=colour) for span in row.spans)
            lines += ["  " + line for line in text.split("\n")]
    return "\n".join(lines[1:])


def terminal_stats(histograms: Sequence[Histogram], balances: Sequence[KindOfPlan], ranks: int) -> str:
    """Distributions as bars of characters, and the balance of plans as a table."""
    blocks = " ▁▂▃▄▅▆▇█"
    lines = []
    for histogram in histograms:
        top = max(histogram.counts)
        bar = "".join(blocks[-(-8 * count // top)] for count in histogram.counts)
        lines.append(f"{histogram.name:14s} |{bar}|  {histogram_facts(histogram)}")
    rows = [BALANCE_HEAD, *(balance_cells(plan) for plan in balances)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(BALANCE_HEAD))]
    lines += ["", f"{ranks} ranks; cost in tokens, as planned:"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _terminal_span(kind: str, text: str, tokens: int, *, colour: bool) -> str:
    assert kind in KINDS
    shown = span_text(kind, text, tokens)
    if kind == "padding":
        return f"\033[{_ANSI[kind]}m[{shown}]\033[0m" if colour else f"[{shown}]"
    if colour:
        shown = f"[{shown}]" if kind in ("latent", "image") else shown
        return f"\033[{_ANSI[kind]}m{shown}\033[0m" if _ANSI[kind] else shown
    if kind == "label":
        return f"{{{shown}}}"
    return f"[{shown}]" if kind in ("latent", "image") else shown
