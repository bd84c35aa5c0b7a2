"""The probe's page: from numbers (probe.json) and examples to sentences, tables and one HTML file.

Everything here is plain values; `templates/probe.html` escapes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coconut.evaluation.figures import LIGHT_WIDE, SCREENS, Style
from coconut.evaluation.figures_probe import draw_causal, draw_frontier
from coconut.evaluation.page import data_uri, render
from coconut.evaluation.wording import percent

#: What is done under each name of the causal table.
CHANGES = {
    "zeros": "Every thought is replaced by the zero vector before it is fed back.",
    "noise of the same norm": "Every thought is replaced by a random direction of just its length.",
    "the mean thought": "Thought t is replaced by the mean of thought t over all questions: what all have in common.",
    "another question’s thoughts": "What the model thought about another question and picture is fed back.",
    "its thoughts in another order": "Its own thoughts, none in its place.",
    "thoughts cut from memory": "It thinks as ever; then keys and values of the thoughts are hidden from the answer, "
    "and nothing else moves.",
    "another picture from the beginning": "The picture of another question, for reading, thinking and answering. The "
    "truth stays that of the question, so a model that looks must fall to chance.",
    "another picture after thinking": "It thinks over its own picture; then keys and values of the picture are "
    "replaced by those of another one, and the thoughts stay.",
}


def write_page(numbers: dict[str, Any], minds: Sequence[dict[str, Any]], out: Path) -> Path:
    """Write index.html and causal.png into a folder.

    Args:
        numbers: as `probe_run.probe_checkpoint` collects them.
        minds: example cards with pictures as data addresses.
        out: the folder.
    """
    rows = numbers["causal"]
    table = [row for row in rows if row["group"] != "alone"]
    drawn = {style: draw_causal(table, style) for style in SCREENS}
    (out / "causal.png").write_bytes(drawn[LIGHT_WIDE])
    alt = "; ".join(f"{row['label']}: {percent(row['accuracy']['mean'])} right" for row in table)
    figures = {"causal": _figure(drawn, alt)}
    for number, example in enumerate((numbers.get("frontier") or {}).get("examples", ())):
        drawn = {style: draw_frontier(example, style) for style in SCREENS}
        (out / f"frontier_{number + 1}.png").write_bytes(drawn[LIGHT_WIDE])
        figures[f"frontier_{number + 1}"] = _figure(drawn, f"the graph of {example['key']}: {example['asked']}")
    context = {
        "title": "Are the thoughts used?",
        "verdict": verdict(numbers),
        "tiles": _tiles(numbers),
        "causal": _causal_table(table, numbers),
        "alone": _alone_table(rows, numbers),
        "swap": _swap_bars(numbers),
        "reading": _reading_table(numbers),
        "path": _path_table(numbers),
        "frontier": _frontier_table(numbers),
        "minds": {"intro": _minds_intro(minds), "cards": minds},
        "words": _words_table(numbers),
        "shape": _shape_table(numbers),
        "notes": _notes(numbers),
        "changes": CHANGES,
        "figures": figures,
    }
    page = out / "index.html"
    unfinished = page.with_suffix(".tmp")
    unfinished.write_text(render(context, "probe"), encoding="utf-8")
    unfinished.replace(page)
    return page


def _figure(drawn: dict[Style, bytes], alt: str) -> dict[str, Any]:
    sources = [(query, data_uri(drawn[style])) for style, query in SCREENS.items() if query]
    return {"sources": sources, "fallback": data_uri(drawn[LIGHT_WIDE]), "alt": alt}


def verdict(numbers: dict[str, Any]) -> list[str]:
    """What was found, in sentences that hold for whatever was probed; the first answers the question."""
    by_name = {row["name"]: row for row in numbers["causal"]}
    own, noise = by_name["own"], by_name["noise"]
    change = noise["change"]
    first = (
        f"With noise of the same norm in place of its thoughts it answers {percent(noise['accuracy']['mean'])} instead "
        f"of {percent(own['accuracy']['mean'])}: {points(change['mean'])} points, 95 % interval "
        f"{points(change['low'])} to {points(change['high'])}."
    )
    # Thoughts may be needed and yet say nothing: then those of any question do as well.
    strangers = [by_name[name] for name in ("mean", "other") if name in by_name]
    if change["high"] < 0 and strangers and all(row["change"]["high"] >= 0 for row in strangers):
        found = " and ".join(f"{row['label']} {percent(row['accuracy']['mean'])}" for row in strangers)
        sentences = [
            f"Thoughts are needed, but no use of what they say of the question can be seen. {first}",
            f"Yet it answers as well with others in their place: {found}.",
        ]
    elif change["high"] < 0:
        sentences = [f"The thoughts are used. {first}"]
    elif change["low"] > 0:
        sentences = [f"The thoughts do harm. {first}"]
    else:
        sentences = [f"No use of the thoughts can be seen in the answers. {first}"]
        if noise["nats_change"]["high"] < 0:
            sentences.append(f"The true answer does grow less likely, by {-noise['nats_change']['mean']:.2f} nats.")
    if (swap := numbers.get("swap")) and swap[-1]["hop"] is None:
        sentences.append(
            f"Given all thoughts of another puzzle, {percent(swap[-1]['implied'])} of the answers become the colour "
            "that those thoughts lead to in this picture."
        )
    if late := numbers.get("late_picture"):
        sentence = (
            f"Shown another picture after thinking, {percent(late['share'])} of the answers name the colour that "
        )
        sentence += "the new picture has at the end of the path"
        found = ": the thoughts hold a place, and the colour is looked up last." if late["low"] > 0.5 else "."
        sentences.append(sentence + found)
    if path := numbers.get("path"):
        cells = [path["share"][i][i] for i in range(min(len(path["rows"]), len(path["columns"])))]
        sentences.append(
            f"While it thinks, {percent(min(cells))} or more of its attention to the picture lies on the cell whose "
            "turn it is; even attention would put 6.2 % there."
        )
    return sentences


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _tiles(numbers: dict[str, Any]) -> list[dict[str, str]]:
    by_name = {row["name"]: row for row in numbers["causal"]}
    tiles = [{"value": percent(by_name["own"]["accuracy"]["mean"]), "label": "right, thinking its own thoughts"}]
    labels = {"noise": "right, with noise instead", "cut": "right, with the thoughts cut from memory"}
    tiles += [{"value": percent(by_name[n]["accuracy"]["mean"]), "label": label} for n, label in labels.items()]
    if swap := numbers.get("swap"):
        tiles.append({"value": percent(swap[-1]["implied"]), "label": "answers that other thoughts moved as implied"})
    return tiles


def _causal_table(rows: Sequence[dict[str, Any]], numbers: dict[str, Any]) -> dict[str, Any]:
    head = ["Instead of its thoughts", "Right", "Change, points", "Log-likelihood", "Change, nats", "Tokens written"]
    body = []
    for row in rows:
        accuracy, change, nats = row["accuracy"], row["change"], row["nats_change"]
        is_own = row["name"] == "own"
        cells = [
            {"value": percent(accuracy["mean"]), "note": f"{100 * accuracy['low']:.1f} – {100 * accuracy['high']:.1f}"},
            {"value": "–"} if is_own else {"value": points(change["mean"]), "note": _range(change, points)},
            {"value": f"{row['nats']:.2f}".replace("-0.00", "0.00").replace("-", "−")},
            {"value": "–"} if is_own else {"value": _signed(nats["mean"]), "note": _range(nats, _signed)},
            {"value": f"{row['tokens']:.1f}"},
        ]
        label = row["label"] if row["accuracy"]["n"] == numbers["n"] else f"{row['label']} ({row['accuracy']['n']:,})"
        body.append({"name": label, "cells": cells})
    intro = (
        f"The same {numbers['n']:,} questions, each time with one thing changed. If answers stay when thoughts are "
        "replaced by noise, they were never needed. Differences are paired, question by question; small figures are "
        "95 % intervals (Wilson’s for a share, bootstrap for a change)."
    )
    longest = max(rows, key=lambda row: row["tokens"])
    if longest["tokens"] > rows[0]["tokens"] + 2:
        intro += (
            f" Where it writes more than with its own thoughts (“{longest['label']}”: {longest['tokens']:.1f} tokens, "
            f"not {rows[0]['tokens']:.1f}), it falls back to written steps, and part of what is right there is owed to "
            "them."
        )
    return {"intro": intro, "head": head, "rows": body}


def _alone_table(rows: Sequence[dict[str, Any]], numbers: dict[str, Any]) -> dict[str, Any] | None:
    alone = [row for row in rows if row["group"] == "alone"]
    if not alone:
        return None
    kinds = list(dict.fromkeys(row["label"] for row in alone))
    names = {
        "noise": "noise in its place, later ones thought anew",
        "cut": "hidden from the answer alone",
        "only this one kept": "all others hidden from the answer",
    }
    body = [
        {"name": names.get(kind, kind), "cells": [_share(row["accuracy"]) for row in alone if row["label"] == kind]}
        for kind in kinds
    ]
    intro = (
        "Right answers when a single thought is changed. A thought that only hands its content on to the next one may "
        "be hidden from the answer without harm, though noise in its place breaks the chain."
    )
    return {"intro": intro, "head": [f"thought {t + 1}" for t in range(numbers["n_thoughts"])], "rows": body}


def _swap_bars(numbers: dict[str, Any]) -> dict[str, Any] | None:
    if not numbers.get("swap"):
        return None
    rows = []
    for row in numbers["swap"]:
        parts = [row["implied"], row["own"], row["other"]]
        interval = f"{100 * row['low']:.1f} – {100 * row['high']:.1f}"
        text = f"{percent(row['implied'])} as implied ({interval}), {row['n']:,} pairs"
        rows.append(
            {
                "label": row["label"] if row["hop"] is None else f"the {row['label']} alone",
                "text": text,
                "parts": [f"{100 * part:.2f}" for part in parts],
            }
        )
    intro = (
        "Another puzzle’s thought is put in, and the model thinks on from there. If the thought of hop h stands for "
        "the cell reached after h hops, the answer must become the colour at which the arrows of this picture end when "
        "they "
        "are followed on from the other puzzle’s cell. Only pairs are counted in which that colour is neither the true "
        "answer nor the other puzzle’s; chance is one in eight."
    )
    return {"intro": intro, "rows": rows}


def _reading_table(numbers: dict[str, Any]) -> dict[str, Any] | None:
    reading = numbers.get("reading")
    if reading is None:
        return None
    body: list[dict[str, Any]] = [
        {
            "name": f"thought {t + 1}",
            "cells": [
                _share({"mean": value, "low": low, "high": high})
                for value, (low, high) in zip(row, reading["intervals"][t], strict=True)
            ],
        }
        for t, row in enumerate(reading["accuracy"])
    ]
    body += [
        {"name": name, "base": True, "cells": [_share({"mean": value}) for value in values]}
        for name, values in reading["baselines"].items()
    ]
    what = "the cell that hop reaches" if numbers.get("swap") else "a step’s last word"
    intro = (
        f"A linear classifier is trained on {reading['n_train']:,} questions to name {what} from one thought, and "
        f"tested on {reading['n_test']:,} others. Below it, two guesses that see no thought at all."
    )
    head = [f"after hop {j + 1}" for j in range(len(reading["columns"]))] if numbers.get("swap") else reading["columns"]
    return {"intro": intro, "head": head, "rows": body}


def _path_table(numbers: dict[str, Any]) -> dict[str, Any] | None:
    path = numbers.get("path")
    if path is None:
        return None
    body = [
        {"name": f"making {name}" if name.startswith("thought") else name, "cells": [_share({"mean": v}) for v in row]}
        for name, row in zip(path["rows"], path["share"], strict=True)
    ]
    intro = (
        "Of the attention that goes to the picture while a thought is made, the share on each cell of the path: mean "
        "over "
        f"{path['n']} questions, in the layer that looks most sharply. Even attention would put 6.2 % on every cell."
    )
    return {"intro": intro, "head": path["columns"], "rows": body}


def _frontier_table(numbers: dict[str, Any]) -> dict[str, Any] | None:
    frontier = numbers.get("frontier")
    if frontier is None:
        return None
    names = ("path", "level", "other", "best_on_path", "best_on_level")
    body = [
        {
            "name": f"after {_several(row['thoughts'], 'thought')}, {_several(row['n'], 'question')}",
            "cells": [{"value": f"{row['reached']:.1f}", "shade": 0}, *(_share({"mean": row[name]}) for name in names)],
        }
        for row in frontier["rows"]
    ]
    intro = (
        "The model is made to write after some of its thoughts: the probability that the step which would come next "
        "begins with each node's name (after “Every”, where steps begin so). A search in breadth keeps several nodes "
        "open and narrows down; a model that walks one path puts all on one node at once. In the figures a node that "
        "is already left has little, the line is the written path, the answer is bold."
    )
    head = [
        "nodes so many edges from the root",
        "on the path's node",
        "on the others of these",
        "on all other nodes",
        "likeliest: the path's",
        "likeliest: so many edges away",
    ]
    cards = [{"name": f"frontier_{n + 1}", "asked": e["asked"]} for n, e in enumerate(frontier["examples"])]
    return {"intro": intro, "head": head, "rows": body, "cards": cards}


def _minds_intro(minds: Sequence[dict[str, Any]]) -> str:
    looks = (
        " The picture is bright where the model looks while it makes that thought."
        if minds and minds[0]["image"]
        else ""
    )
    return (
        "Each thought, sent through the language head as if it were to be spoken: its likeliest words."
        + looks
        + " Beneath "
        "stands the written step that the thought took the place of; the model never saw it here."
    )


def _words_table(numbers: dict[str, Any]) -> dict[str, Any]:
    words = numbers["words"]
    body: list[dict[str, Any]] = [
        {
            "name": f"thought {t + 1}",
            "cells": [
                {"value": percent(v), "shade": round(v, 3), "note": f"another question’s: {percent(c)}"}
                for v, c in zip(row, words["chance"][t], strict=True)
            ],
        }
        for t, row in enumerate(words["share"])
    ]
    largest = [max(values) for values in zip(*words["chance"], strict=True)]
    body.append(
        {"name": "another question’s step, at most", "base": True, "cells": [_share({"mean": v}) for v in largest]}
    )
    intro = (
        "How often the likeliest word of a thought is a word of each written step. Thoughts need not be words; where "
        "the numbers are no larger than for the steps of another question, the lens shows nothing."
    )
    return {"intro": intro, "head": words["columns"], "rows": body}


def _shape_table(numbers: dict[str, Any]) -> dict[str, Any]:
    shape = numbers["geometry"]
    body: list[dict[str, Any]] = [
        {"name": f"thought {t + 1}", "cells": [{"value": f"{v:.2f}", "shade": round(max(v, 0.0), 3)} for v in row]}
        for t, row in enumerate(shape["cosine"])
    ]
    if shape["across"]:
        cells = [{"value": f"{v:.2f}"} for v in shape["across"]]
        body.append({"name": "same thought, other question", "base": True, "cells": cells})
    norms = [f"{m:.2f} ± {s:.2f}" for m, s in zip(shape["norm_mean"], shape["norm_std"], strict=True)]
    body.append({"name": "norm", "base": True, "cells": [{"value": v} for v in norms]})
    intro = (
        "Cosines between the thoughts of one question, averaged. Thoughts that all point one way would hold little. "
        f"Word embeddings have a mean norm of {shape['embedding_norm']:.2f}."
    )
    return {"intro": intro, "head": [f"thought {t + 1}" for t in range(len(shape["cosine"]))], "rows": body}


def _notes(numbers: dict[str, Any]) -> list[str]:
    made = (
        f"Checkpoint {numbers['checkpoint']}, stage {numbers['stage']}, {numbers['n_thoughts']} thoughts; data "
        f"{numbers['data']}, {numbers['n']:,} questions; greedy answers of at most {numbers['max_new_tokens']} "
        f"tokens; seed {numbers['seed']}."
    )
    lines = [made]
    if numbers["unreadable"]:
        count = len(numbers["unreadable"])
        lines.append(
            f"{count} further samples could not be read and are not in these numbers: {numbers['unreadable'][0]}"
        )
    return lines


def _share(value: dict[str, float]) -> dict[str, Any]:
    note = f"95 % interval {100 * value['low']:.1f} – {100 * value['high']:.1f}" if "low" in value else ""
    return {"value": percent(value["mean"]), "shade": round(value["mean"], 3), "note": note}


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _range(values: dict[str, float], write: Any) -> str:
    return f"{write(values['low'])} to {write(values['high'])}"
