"""The arrow maze as a folder of files: shards of every split, a few records to look at, and the facts about them.

out/shards/SPLIT/    WebDataset shards, which training and evaluation read
out/examples/        examples.json and images/: the same records as a user would write them, a few of them
out/arrow_maze.json  what was asked for, number of paths, balance of answers, look-up floors; complete or not
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.data.arrow_maze import (
    CELL_PX,
    COLOUR_NAMES,
    SPLIT_SIZES,
    Puzzle,
    Renderer,
    all_paths,
    draw_puzzles,
    lookup_floors,
    split_paths,
    to_samples,
)
from coconut.data.sample import record_from_sample
from coconut.data.shards import write_shards
from coconut.types import DataError

N_EXAMPLES = 32
MARKER = "arrow_maze.json"


def ensure_arrow_maze(
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    cell_px: int = CELL_PX,
    sizes: Mapping[str, int] | None = None,
    force: bool = False,
) -> bool:
    """Make the data set in the folder `out`, unless it is there already; returns whether anything was made.

    One process at a time may call it.

    Args:
        out: folder of the data set.
        seed: decides every puzzle.
        cell_px: pixels a cell; the picture has four cells a side.
        sizes: puzzles of each split; SPLIT_SIZES when left out.
        force: replace a data set that was made with other settings.
    """
    out = Path(out)
    request: dict[str, Any] = {"format": 1, "seed": seed, "cell_px": cell_px, "sizes": dict(sizes or SPLIT_SIZES)}
    if not force and _is_complete(out, request):
        return False
    renderer = Renderer(cell_px)
    puzzles = draw_puzzles(request["sizes"], seed)
    # The marker is written first as incomplete and last as complete: a killed run is known as ours, and begun again.
    # What the folders hold is whole as soon as they have their names.
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / MARKER, {"complete": False, "request": request})
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    _write_examples(puzzles.get("train", []), renderer, partial / "examples")
    for split, drawn in puzzles.items():
        write_shards(to_samples(drawn, split, renderer), partial / "shards" / split)
    for folder in ("examples", "shards"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (partial / folder).rename(out / folder)
    partial.rmdir()
    _write_json(out / MARKER, {"complete": True, "request": request, **_facts(puzzles, seed)})
    return True


def _is_complete(out: Path, request: dict[str, Any]) -> bool:
    """Whether `out` holds just this data set; DataError if it holds another one or somebody else's files."""
    marker = out / MARKER
    if not marker.exists():
        taken = [folder for folder in ("shards", "examples") if (out / folder).exists()]
        if taken:
            raise DataError(f"{out / taken[0]} exists but was not made here; choose another --out, or move it away")
        return False
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        made, complete = found["request"], found["complete"]
    except (ValueError, KeyError) as error:
        raise DataError(f"{marker} is damaged ({error}); --force makes the data again") from error
    different = [
        f"{key} {made.get(key)} (asked for: {value})" for key, value in request.items() if made.get(key) != value
    ]
    if different and complete:
        raise DataError(
            f"{out} holds an arrow maze with other settings: {'; '.join(different)}; use --force or another --out"
        )
    return bool(complete) and all((out / "shards" / split).is_dir() for split in request["sizes"])


def _write_examples(puzzles: Sequence[Puzzle], renderer: Renderer, folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    records = []
    for sample in to_samples(puzzles[:N_EXAMPLES], "train", renderer):
        image = f"images/{sample.key}.png"
        (folder / image).write_bytes(sample.images[0])  # type: ignore[arg-type]
        records.append(record_from_sample(sample, [image]))
    _write_json(folder / "examples.json", records)


def _facts(puzzles: Mapping[str, Sequence[Puzzle]], seed: int) -> dict[str, Any]:
    """What a reader of results wants to know about the data."""
    common, held_out = split_paths(seed)
    return {
        "paths": {"all": len(all_paths()), "train, val, test": len(common), "test_paths": len(held_out)},
        "answers": {
            split: {name: sum(puzzle.answer == name for puzzle in drawn) for name in COLOUR_NAMES}
            for split, drawn in puzzles.items()
        },
        "floors": lookup_floors(puzzles["train"], puzzles["test"]) if {"train", "test"} <= puzzles.keys() else {},
    }


def _write_json(path: Path, value: Any) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
