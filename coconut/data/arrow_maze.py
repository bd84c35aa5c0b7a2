"""The arrow maze: a task that a tiny vision-language model can only solve by reasoning over the picture.

    paths -> Puzzle (arrows, colours, path) -> picture (PNG) + text -> Sample   (arrow_maze_files.py: -> shards)

A picture shows 4 x 4 cells, each with a colour and an arrow. The question names a start cell; the answer is the
colour of the cell that four arrows lead to. Cells are named as on a chess board seen from above: column a-d, row 1-4
from the top.

    start a4 ?            question
    blue up a3            one step a hop: the colour here, the arrow here, the next cell
    ...
    ### red               answer: the colour of the last cell, which no step has looked at

What keeps the task honest: colours are independent of everything else, so neither the start nor the arrows say
anything about the answer; only `test_paths` uses the held-out paths (start and directions); and no two puzzles of
the whole data set, in whatever splits, share the same arrows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from coconut.types import DataError, Sample

GRID = 4  # cells a side
HOPS = 4  # arrows followed
CELL_PX = 28  # default cell: two patches of 14 a side, which pixel shuffle turns into one image token
COLOURS = {
    "red": (205, 38, 38),
    "orange": (242, 142, 28),
    "yellow": (236, 204, 44),
    "green": (38, 150, 70),
    "cyan": (54, 188, 206),
    "blue": (36, 84, 204),
    "purple": (124, 58, 170),
    "pink": (246, 136, 190),
}
DIRECTIONS = ("up", "right", "down", "left")  # clockwise, so that direction d is "up" turned d quarters
COLOUR_NAMES = tuple(COLOURS)
SPLIT_SIZES = {"train": 20_000, "val": 500, "test": 2_000, "test_paths": 500}
HELD_OUT_SPLIT = "test_paths"
HELD_OUT_SHARE = 0.1  # of all paths

_STEP = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}
_MAX_PUZZLES = 1_000_000  # 27 million pictures of arrows exist; far fewer keep drawing distinct ones fast

Path = tuple[int, ...]  # the cells of a walk, numbered row by row, start first


def cell_name(cell: int) -> str:
    """Name of a cell number: 0 is a1 (top left), 3 is d1, 12 is a4."""
    return "abcd"[cell % GRID] + str(cell // GRID + 1)


def neighbour(cell: int, direction: int) -> int | None:
    """The cell that an arrow points to, or None outside the grid."""
    down, right = _STEP[DIRECTIONS[direction]]
    row, column = cell // GRID + down, cell % GRID + right
    return row * GRID + column if 0 <= row < GRID and 0 <= column < GRID else None


@lru_cache
def all_paths() -> tuple[Path, ...]:
    """Every walk of HOPS steps that never enters a cell twice; there are 432."""

    def extend(path: Path) -> Iterator[Path]:
        if len(path) == HOPS + 1:
            yield path
            return
        for direction in range(len(DIRECTIONS)):
            cell = neighbour(path[-1], direction)
            if cell is not None and cell not in path:
                yield from extend((*path, cell))

    return tuple(path for start in range(GRID * GRID) for path in extend((start,)))


def split_paths(seed: int) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """All paths as (those of train, val and test; those held out for `test_paths`), drawn at random."""
    paths = all_paths()
    order = np.random.default_rng([seed, 0]).permutation(len(paths))
    n_held_out = round(HELD_OUT_SHARE * len(paths))
    return tuple(paths[i] for i in sorted(order[n_held_out:])), tuple(paths[i] for i in sorted(order[:n_held_out]))


@dataclass(frozen=True)
class Puzzle:
    """One maze: what each cell shows, and the walk from the start."""

    arrows: tuple[int, ...]  # direction of each cell, row by row
    colours: tuple[int, ...]  # index in COLOUR_NAMES of each cell
    path: Path

    @property
    def question(self) -> str:
        return f"start {cell_name(self.path[0])} ?"

    @property
    def steps(self) -> tuple[str, ...]:
        # The colour *here*, not of the next cell: else the last step would spell the answer, and answering would be
        # copying text instead of looking.
        return tuple(
            f"{COLOUR_NAMES[self.colours[here]]} {DIRECTIONS[self.arrows[here]]} {cell_name(after)}"
            for here, after in pairwise(self.path)
        )

    @property
    def answer(self) -> str:
        return COLOUR_NAMES[self.colours[self.path[-1]]]


def draw_puzzles(sizes: Mapping[str, int], seed: int) -> dict[str, list[Puzzle]]:
    """Puzzles of each split, decided by `seed` alone; raises DataError for sizes that cannot be met.

    Train is drawn last, so that its size changes no puzzle of the other splits.
    """
    unknown = sorted(set(sizes) - set(SPLIT_SIZES))
    if unknown:
        raise DataError(f"unknown split {unknown[0]!r}; choose from {', '.join(SPLIT_SIZES)}")
    total = sum(sizes.values())
    if min(sizes.values(), default=1) < 1 or total > _MAX_PUZZLES:
        raise DataError(f"a split has at least 1 puzzle, all have at most {_MAX_PUZZLES:,}; not {dict(sizes)}")
    common, held_out = split_paths(seed)
    seen: set[bytes] = set()
    drawn = {}
    for number, split in enumerate(("test_paths", "test", "val", "train"), start=1):
        if split in sizes:
            paths = held_out if split == HELD_OUT_SPLIT else common
            drawn[split] = _draw_split(sizes[split], paths, np.random.default_rng([seed, number]), seen)
    return {split: drawn[split] for split in sizes}


def _draw_split(n: int, paths: Sequence[Path], rng: np.random.Generator, seen: set[bytes]) -> list[Puzzle]:
    cells = np.arange(GRID * GRID)
    # Arrows off the path are random as well, but none points out of the picture.
    inside = [[d for d in range(4) if neighbour(int(cell), d) is not None] for cell in cells]
    n_inside = np.array([len(choices) for choices in inside])
    choices = np.array([(*c, *(-1,) * (4 - len(c))) for c in inside])
    puzzles: list[Puzzle] = []
    while len(puzzles) < n:
        arrows = choices[cells, (rng.random(GRID * GRID) * n_inside).astype(int)]
        colours = rng.integers(len(COLOURS), size=GRID * GRID)
        path = paths[int(rng.integers(len(paths)))]
        for here, after in pairwise(path):
            arrows[here] = next(d for d in range(4) if neighbour(here, d) == after)
        key = arrows.astype(np.int8).tobytes()
        if key not in seen:
            seen.add(key)
            puzzles.append(Puzzle(tuple(arrows.tolist()), tuple(colours.tolist()), path))
    return puzzles


class Renderer:
    """Draws puzzles as PNG files of `cell_px` pixels a cell.

    All pictures share one palette, computed from the 32 tiles: the files become small and quick to write, and two
    cells that show the same are the same pixel for pixel.
    """

    def __init__(self, cell_px: int = CELL_PX) -> None:
        if cell_px < 8:
            raise DataError(f"a cell of {cell_px} pixels is too small for an arrow; take at least 8")
        sheet = np.concatenate([_tile(rgb, turns, cell_px) for rgb in COLOURS.values() for turns in range(4)])
        paletted = Image.fromarray(sheet).quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        self._palette = paletted.getpalette()
        self._tiles = np.asarray(paletted).reshape(len(COLOURS) * 4, cell_px, cell_px)

    def image(self, puzzle: Puzzle) -> Image.Image:
        ids = (np.array(puzzle.colours) * 4 + np.array(puzzle.arrows)).reshape(GRID, GRID)
        tiles = self._tiles[ids]  # [row, column, y, x]
        side = GRID * tiles.shape[-1]
        picture = Image.fromarray(tiles.transpose(0, 2, 1, 3).reshape(side, side))
        assert self._palette is not None
        picture.putpalette(self._palette)  # turns the grey picture of indices into one with colours
        return picture

    def png(self, puzzle: Puzzle) -> bytes:
        buffer = io.BytesIO()
        self.image(puzzle).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()


def _tile(rgb: tuple[int, int, int], quarter_turns: int, cell_px: int) -> np.ndarray:
    """One cell as uint8 [y, x, 3]: a coloured square with a white arrow, smoothed by drawing it larger."""
    scale = 8
    side = cell_px * scale
    tile = Image.new("RGB", (side, side), (250, 250, 250))
    pen = ImageDraw.Draw(tile)
    margin = side // 28
    pen.rounded_rectangle((margin, margin, side - 1 - margin, side - 1 - margin), radius=side // 8, fill=rgb)
    arrow = ((0.5, 0.15), (0.82, 0.5), (0.62, 0.5), (0.62, 0.85), (0.38, 0.85), (0.38, 0.5), (0.18, 0.5))  # up
    pen.polygon([(x * side, y * side) for x, y in arrow], fill="white", outline=(30, 30, 30), width=side // 40)
    # Turning the finished pixels, instead of the corners, keeps the four arrows exact turns of one another.
    turned = np.rot90(np.asarray(tile), -quarter_turns)
    return np.asarray(Image.fromarray(turned).resize((cell_px, cell_px), Image.Resampling.LANCZOS))


def to_samples(puzzles: Sequence[Puzzle], split: str, renderer: Renderer) -> Iterator[Sample]:
    """The puzzles as the trainer's own samples, drawn one at a time; the picture travels as PNG bytes."""
    for number, puzzle in enumerate(puzzles):
        yield Sample(
            key=f"{split}-{number:06d}",
            question=puzzle.question,
            steps=puzzle.steps,
            answer=puzzle.answer,
            images=(renderer.png(puzzle),),
            source=f"arrow maze, {split}",
        )


def vocabulary() -> tuple[str, ...]:
    """Every word of the questions, steps and answers, in a fixed order: what a word-level tokenizer needs."""
    cells = tuple(cell_name(cell) for cell in range(GRID * GRID))
    return ("\n", "###", "?", "start", *DIRECTIONS, *cells, *COLOUR_NAMES)


def lookup_floors(train: Sequence[Puzzle], test: Sequence[Puzzle]) -> dict[str, float]:
    """Share of `test` that a table of the training paths answers, without following the path through the picture.

    The guess knows the start cell, the first 0, 1 or 2 arrows and where training paths that begin so have ended, and
    names the colour that is likeliest in this picture. What a model scores above it, it owes to looking further.
    """
    floors = {"uniform chance": 1 / len(COLOURS)}
    for known, name in enumerate(("start cell", "start and first arrow", "start and two arrows")):
        ends: dict[Path, np.ndarray] = {}
        for puzzle in train:
            counts = ends.setdefault(puzzle.path[: known + 1], np.zeros(GRID * GRID))
            counts[puzzle.path[-1]] += 1
        right = 0
        for puzzle in test:
            counts = ends.get(puzzle.path[: known + 1], np.ones(GRID * GRID))
            likely = np.bincount(puzzle.colours, weights=counts, minlength=len(COLOURS)).argmax()
            right += COLOUR_NAMES[likely] == puzzle.answer
        floors[name] = right / len(test)
    return floors
