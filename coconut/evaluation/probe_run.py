"""A checkpoint and data in, a page about its thoughts out: what `launch/probe.py` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coconut.evaluation.loaded import load
from coconut.evaluation.page import data_uri
from coconut.evaluation.probe import Outcome, Study, conditions, effects
from coconut.evaluation.probe_graph import frontier
from coconut.evaluation.probe_look import Look, attention_on_path, looks, paint
from coconut.evaluation.probe_maze import late_picture, read_mazes, swap
from coconut.evaluation.probe_page import write_page
from coconut.evaluation.probe_words import geometry, lens, lens_against_steps, linear_probe
from coconut.evaluation.result import write_whole

NUMBERS_FILE = "probe.json"
N_MINDS = {True: 4, False: 3}  # example cards of right and of wrong answers
_PICTURE_PX = 224
_PATH_SAMPLES = 50
_GRAPHS = 500  # questions of ProsQA whose search is looked at


def probe_checkpoint(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    image_root: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Probe, and write OUT/index.html, OUT/causal.png and OUT/probe.json; returns what the last one holds.

    Args:
        checkpoint: from `run.find_checkpoint`.
        data: folder of shards, or a JSON or JSONL file.
        out: folder to write.
        limit, batch_size, max_new_tokens, seed: as `Study` takes them.
        image_root: folder of a JSON file's images; None is the file's own.
        say: is told what is being done.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        DataError: nothing can be probed.
    """
    from coconut.data import open_dataset

    loaded = load(checkpoint)
    source = open_dataset(data, image_root=image_root)
    study = Study(loaded, source, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed)
    say(f"{len(study)} questions, {study.n_thoughts} thoughts each at most")
    planned = conditions(study)
    outcomes = {}
    for condition in planned:
        outcomes[condition.name] = study.run(condition)
        share = sum(outcomes[condition.name].correct) / len(study)
        part = "" if condition.thought is None else f" (thought {condition.thought + 1} alone)"
        say(f"{condition.label}{part}: {share:.1%} right")
    numbers: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "data": str(data),
        "stage": loaded.spec.stage,
        "n": len(study),
        "n_thoughts": study.n_thoughts,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "unreadable": study.unreadable,
        "causal": effects(planned, outcomes, seed),
        "words": lens_against_steps(study),
        "reading": linear_probe(study),
        "geometry": geometry(study),
    }
    mazes = read_mazes(study)
    if mazes is not None:
        say("the data is the arrow maze: swapping thoughts between puzzles")
        numbers["swap"] = swap(study, mazes)
        shown = next((c.donors for c in planned if c.name == "image"), None)
        if shown is not None:
            numbers["late_picture"] = late_picture(mazes, shown, outcomes["image_after"].answers)
        if study.model.tokens_per_patch == len(mazes[0].arrows):  # an image token a cell
            rows = range(min(_PATH_SAMPLES, len(study)))
            numbers["path"] = attention_on_path(study, [maze.path for maze in mazes], rows)
    search = frontier(study, _GRAPHS)
    if search is not None:
        say("the data is ProsQA: what the thoughts hold possible was read")
        numbers["frontier"] = search
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / NUMBERS_FILE, json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")
    write_page(numbers, _minds(study, outcomes["own"]), out)
    return numbers


def _minds(study: Study, own: Outcome) -> list[dict[str, Any]]:
    """Cards of some questions: right ones, then wrong ones."""
    cards = []
    for is_right in (True, False):
        chosen = [row for row in range(len(study)) if own.correct[row] is is_right]
        cards += [_mind(study, row, own) for row in chosen[: N_MINDS[is_right]]]
    return cards


def _mind(study: Study, row: int, own: Outcome) -> dict[str, Any]:
    from coconut.data.image import open_image

    sample, thoughts_TH = study.samples[row], study.thoughts[row]
    images = study.source.read(study.indices[row]).images
    picture = open_image(images[0]) if len(images) == 1 else None
    seen = looks(study, row) if picture is not None else []

    def painted(look: Look) -> str:
        assert picture is not None
        return data_uri(paint(picture, look.weights_yx, _PICTURE_PX))

    shown = {look.label: painted(look) for look in seen}
    cards: list[dict[str, Any]] = []
    for number, tokens in enumerate(lens(study, thoughts_TH)):
        label, step = f"thought {number + 1}", number // study.loaded.spec.c_thought
        cards.append(
            {
                "label": label,
                "image": shown.get(label),
                "tokens": [
                    {"token": t["token"], "share": f"{t['share']:.0%}", "v": round(t["share"], 3)} for t in tokens
                ],
                "step": sample.steps[step] if step < len(sample.steps) else None,
            }
        )
    if "answer" in shown:
        cards.append({"label": "answer", "image": shown["answer"], "tokens": [], "step": None})
    return {
        "key": sample.key,
        "question": sample.question,
        "truth": sample.answer,
        "said": own.answers[row] or "(nothing)",
        "correct": own.correct[row],
        "image": data_uri(paint(picture, _evenly(), _PICTURE_PX)) if picture is not None else None,
        "thoughts": cards,
    }


def _evenly() -> Any:
    """Attention that is the same everywhere: the picture as it is."""
    import numpy as np

    return np.ones((1, 1))
