"""The arrow maze's own question: does a thought stand for a cell, and can it be moved to another one?

A picture is read back into its arrows and colours, so that it is known where a walk over *this* picture leads from a
cell that another puzzle's thought stands for.

    puzzle A (picture, thoughts) + thought h of puzzle B
        -> if thought h holds B's cell after hop h, the answer is the colour where A's arrows lead from there
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from coconut.data.arrow_maze import COLOUR_NAMES, GRID, HOPS, Puzzle, Renderer, cell_name, neighbour
from coconut.data.image import open_image
from coconut.evaluation.interventions import donors_within
from coconut.evaluation.probe import Condition, Study, at_thoughts
from coconut.evaluation.score import normalise, wilson_interval
from coconut.types import DataError, Sample

_CELLS = {cell_name(cell): cell for cell in range(GRID * GRID)}


def read_maze(sample: Sample) -> Puzzle | None:
    """The puzzle that a sample's picture and question show; None where they are no arrow maze."""
    words = sample.question.split()
    if len(sample.images) != 1 or len(words) < 2 or words[1] not in _CELLS:
        return None
    try:
        picture = open_image(sample.images[0])
    except DataError:
        return None
    side, rest = divmod(picture.width, GRID)
    if rest or picture.size != (picture.width, picture.width) or side < 8:
        return None
    pixels = np.asarray(picture, dtype=np.int16)
    tiles = _tiles(side)
    shown = []
    for cell in range(GRID * GRID):
        row, column = divmod(cell, GRID)
        tile = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
        distances = np.abs(tiles - tile).mean(axis=(1, 2, 3))
        if distances.min() > 4:  # of 255; the same tile is the same to the pixel, or to a JPEG's noise
            return None
        shown.append(int(distances.argmin()))
    arrows, colours = tuple(i % 4 for i in shown), tuple(i // 4 for i in shown)
    path = [_CELLS[words[1]]]
    for _ in range(HOPS):
        after = neighbour(path[-1], arrows[path[-1]])
        if after is None:
            return None
        path.append(after)
    puzzle = Puzzle(arrows, colours, tuple(path))
    return puzzle if normalise(puzzle.answer) == normalise(sample.answer) else None


@lru_cache(maxsize=4)
def _tiles(side: int) -> np.ndarray:
    """Every tile there is, int16 [32, y, x, 3]: colour i // 4, arrow i % 4, as `Renderer` draws them."""
    renderer, tiles = Renderer(side), []
    for half in (range(16), range(16, 32)):
        puzzle = Puzzle(tuple(i % 4 for i in half), tuple(i // 4 for i in half), path=(0,))
        pixels = np.asarray(renderer.image(puzzle).convert("RGB"), dtype=np.int16)
        grid = pixels.reshape(GRID, side, GRID, side, 3).transpose(0, 2, 1, 3, 4)
        tiles.append(grid.reshape(GRID * GRID, side, side, 3))
    return np.concatenate(tiles)


def read_mazes(study: Study) -> list[Puzzle] | None:
    """The puzzles of all samples; None where one is no arrow maze, or has another number of steps."""
    mazes = []
    for index in study.indices:
        maze = read_maze(study.source.read(index))
        if maze is None:
            return None
        mazes.append(maze)
    whole = study.loaded.spec.c_thought * HOPS
    return mazes if all(len(thoughts) == whole for thoughts in study.thoughts) else None


def walk(maze: Puzzle, cell: int, hops: int) -> int | None:
    """Where the arrows of a picture lead from a cell; None when they leave the picture."""
    for _ in range(hops):
        after = neighbour(cell, maze.arrows[cell])
        if after is None:
            return None
        cell = after
    return cell


def swap(study: Study, mazes: Sequence[Puzzle]) -> list[dict[str, Any]]:
    """Put the thought of hop h of another puzzle in, for each h; then all thoughts at once.

    Only pairs count whose implied answer is neither the true one nor the other puzzle's own answer, so that the three
    can be told apart.

    Returns:
        a row each: shares of answers that are the implied one (with its interval), the true one, the other puzzle's.
    """
    donors = donors_within([0] * len(mazes), study.seed + 2)
    c_thought = study.loaded.spec.c_thought
    rows = []
    for hop in (*range(1, HOPS + 1), None):
        transform = study.of_other(donors)
        if hop is not None:
            transform = at_thoughts(transform, range((hop - 1) * c_thought, hop * c_thought))
        said = study.run(Condition("swap", "swap", transform=transform)).answers
        counts = {"implied": 0, "own": 0, "other": 0}
        n = 0
        for index, (maze, donor) in enumerate(zip(mazes, donors, strict=True)):
            if donor is None:
                continue
            implied = _implied(maze, mazes[donor], hop or HOPS)
            if implied is None or implied in (maze.answer, mazes[donor].answer):
                continue
            n += 1
            told = normalise(said[index] or "")
            counts["implied"] += told == implied
            counts["own"] += told == maze.answer
            counts["other"] += told == mazes[donor].answer
        if n == 0:
            continue
        low, high = wilson_interval(counts["implied"], n)
        label = "all thoughts" if hop is None else f"thought of hop {hop}"
        rows.append({"label": label, "hop": hop, "n": n, "low": low, "high": high}
                    | {name: count / n for name, count in counts.items()})  # fmt: skip
    return rows


def late_picture(
    mazes: Sequence[Puzzle], donors: Sequence[int | None], answers: Sequence[str | None]
) -> dict[str, float | int] | None:
    """Where the picture is changed after thinking: is the answer the new picture's colour at the cell thought of?

    Returns:
        "share" with its interval, over the pairs in which the two pictures differ in that cell.
    """
    pairs = []
    for maze, donor, said in zip(mazes, donors, answers, strict=True):
        if donor is not None and (new := COLOUR_NAMES[mazes[donor].colours[maze.path[-1]]]) != maze.answer:
            pairs.append(normalise(said or "") == new)
    if not pairs:
        return None
    low, high = wilson_interval(sum(pairs), len(pairs))
    return {"share": sum(pairs) / len(pairs), "low": low, "high": high, "n": len(pairs)}


def _implied(maze: Puzzle, other: Puzzle, hop: int) -> str | None:
    """The colour in `maze` at which its arrows end when it goes on from the other puzzle's cell after `hop` hops."""
    end = walk(maze, other.path[hop], HOPS - hop)
    return None if end is None else COLOUR_NAMES[maze.colours[end]]
