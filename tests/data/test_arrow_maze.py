"""The arrow maze: its rules, its splits, its pictures; and that nothing but the picture gives the answer away."""

import io
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from coconut.data.arrow_maze import (
    COLOUR_NAMES,
    COLOURS,
    DIRECTIONS,
    GRID,
    HOPS,
    Puzzle,
    Renderer,
    all_paths,
    cell_name,
    draw_puzzles,
    lookup_floors,
    split_paths,
    to_samples,
    vocabulary,
)
from coconut.types import DataError

SIZES = {"train": 3000, "val": 200, "test": 1000, "test_paths": 200}


@pytest.fixture(scope="module")
def splits():
    return draw_puzzles(SIZES, seed=0)


def read_cell(picture: np.ndarray, cell: int, cell_px: int) -> tuple[str, str]:
    """Colour and direction of a cell, measured from the pixels [y, x, 3]."""
    row, column = divmod(cell, GRID)
    pixels = picture[row * cell_px : (row + 1) * cell_px, column * cell_px : (column + 1) * cell_px].astype(int)
    edge = pixels[cell_px // 7, cell_px // 2 - cell_px // 3]  # beside every arrow, inside the square
    colour = min(COLOURS, key=lambda name: np.abs(edge - COLOURS[name]).sum())
    # The head is broader than the shaft: most of the arrow's white lies in the half it points to.
    frame = cell_px // 10  # the gap between the squares is white as well
    white = (pixels.min(-1) > 200)[frame:-frame, frame:-frame]
    half = len(white) // 2
    halves = {"up": white[:half], "right": white[:, -half:], "down": white[-half:], "left": white[:, :half]}
    return colour, max(halves, key=lambda direction: halves[direction].sum())


def follow(picture: np.ndarray, question: str, cell_px: int) -> tuple[list[str], str]:
    """Solves a puzzle from its picture and question alone."""
    moves = {"up": -GRID, "right": 1, "down": GRID, "left": -1}
    names = [cell_name(cell) for cell in range(GRID * GRID)]
    cell, steps = names.index(question.split()[1]), []
    for _ in range(HOPS):
        colour, direction = read_cell(picture, cell, cell_px)
        cell += moves[direction]
        steps.append(f"{colour} {direction} {names[cell]}")
    return steps, read_cell(picture, cell, cell_px)[0]


def test_there_are_432_paths_and_none_crosses_itself():
    paths = all_paths()
    assert len(paths) == len(set(paths)) == 432
    assert all(len(path) == len(set(path)) == HOPS + 1 for path in paths)
    assert {path[0] for path in paths} == set(range(GRID * GRID))


def test_text_of_a_known_puzzle():
    # a4 is cell 12; up to a3 (8), right to b3 (9), down to b4 (13), right to c4 (14).
    arrows, colours = [0] * 16, [0] * 16
    for cell, direction, colour in (
        (12, "up", "blue"),
        (8, "right", "pink"),
        (9, "down", "red"),
        (13, "right", "cyan"),
    ):
        arrows[cell], colours[cell] = DIRECTIONS.index(direction), COLOUR_NAMES.index(colour)
    colours[14] = COLOUR_NAMES.index("green")
    puzzle = Puzzle(tuple(arrows), tuple(colours), (12, 8, 9, 13, 14))
    assert puzzle.question == "start a4 ?"
    assert puzzle.steps == ("blue up a3", "pink right b3", "red down b4", "cyan right c4")
    assert puzzle.answer == "green"


@pytest.mark.parametrize("cell_px", [28, 112])
def test_pictures_say_what_the_text_says(splits, cell_px):
    renderer = Renderer(cell_px)
    for puzzle in splits["test"][:40]:
        picture = np.asarray(Image.open(io.BytesIO(renderer.png(puzzle))).convert("RGB"))
        assert picture.shape == (GRID * cell_px, GRID * cell_px, 3)
        assert follow(picture, puzzle.question, cell_px) == (list(puzzle.steps), puzzle.answer)


def test_no_arrow_leaves_the_picture(splits):
    # Also the arrows off the path, so that none is recognisable as not part of it.
    for puzzle in splits["val"]:
        for cell, direction in enumerate(puzzle.arrows):
            row, column = divmod(cell, GRID)
            blocked = {"up": row == 0, "right": column == GRID - 1, "down": row == GRID - 1, "left": column == 0}
            assert not blocked[DIRECTIONS[direction]]


def test_splits_share_no_picture_and_only_test_paths_has_its_paths(splits):
    assert {split: len(puzzles) for split, puzzles in splits.items()} == SIZES
    arrows = [puzzle.arrows for puzzles in splits.values() for puzzle in puzzles]
    assert len(arrows) == len(set(arrows))
    paths = {split: {puzzle.path for puzzle in puzzles} for split, puzzles in splits.items()}
    common, held_out = split_paths(seed=0)
    assert len(held_out) == 43
    assert set(common) | set(held_out) == set(all_paths())
    assert not set(common) & set(held_out)
    assert paths["test_paths"] <= set(held_out)
    assert all(paths[split] <= set(common) for split in ("train", "val", "test"))
    assert paths["train"] == set(common)  # every other path is seen in training


def test_held_out_paths_are_a_random_choice():
    held_out = [set(split_paths(seed)[1]) for seed in range(3)]
    assert all(len(a & b) < 20 for a, b in combinations(held_out, 2))
    assert len({path[0] for path in held_out[0]}) > 10  # spread over the start cells


def test_answers_are_balanced_and_independent_of_the_start(splits):
    puzzles = splits["train"] + splits["test"]
    share = 1 / len(COLOURS)
    answers = Counter(puzzle.answer for puzzle in puzzles)
    assert max(abs(count / len(puzzles) - share) for count in answers.values()) < 0.03
    # Guessing by the start cell, learned from train: at chance, within four standard errors.
    table: dict[str, Counter[str]] = {}
    for puzzle in splits["train"]:
        table.setdefault(puzzle.question, Counter())[puzzle.answer] += 1
    right = sum(table[puzzle.question].most_common(1)[0][0] == puzzle.answer for puzzle in splits["test"])
    assert abs(right / SIZES["test"] - share) < 4 * (share * (1 - share) / SIZES["test"]) ** 0.5


def test_same_seed_same_puzzles_and_train_size_leaves_the_rest_alone(splits):
    assert draw_puzzles(SIZES, seed=0) == splits
    smaller = draw_puzzles({**SIZES, "train": 10}, seed=0)
    assert smaller["test"] == splits["test"]
    assert smaller["val"] == splits["val"]
    assert smaller["train"] == splits["train"][:10]
    assert draw_puzzles({"val": 20}, seed=1)["val"] != splits["val"][:20]


def test_samples_carry_small_png_files(splits):
    renderer = Renderer()
    samples = list(to_samples(splits["val"], "val", renderer))
    assert len({sample.key for sample in samples}) == SIZES["val"]
    assert all(isinstance(sample.images[0], bytes) and len(sample.images[0]) < 4000 for sample in samples)
    assert samples[0].answer == splits["val"][0].answer
    assert len(samples[0].steps) == HOPS
    again = next(to_samples(splits["val"], "val", Renderer()))
    assert again == samples[0]


def test_vocabulary_covers_every_word(splits):
    words = vocabulary()
    assert len(words) == len(set(words))
    for puzzle in splits["val"]:
        assert {word for text in (puzzle.question, *puzzle.steps, puzzle.answer) for word in text.split()} <= set(words)


def test_lookup_floors_rise_with_what_is_known(splits):
    floors = list(lookup_floors(splits["train"], splits["test"]).values())
    assert floors[0] == 0.125
    assert floors == sorted(floors)
    assert 0.3 < floors[1] < 0.45
    assert floors[-1] < 0.65
    cheating = lookup_floors(splits["test_paths"], splits["test_paths"])  # one path each start: the table knows it all
    assert list(cheating.values())[-1] > floors[-1]


def test_impossible_requests_are_refused():
    with pytest.raises(DataError, match="unknown split 'dev'"):
        draw_puzzles({"dev": 1}, seed=0)
    with pytest.raises(DataError, match="at most"):
        draw_puzzles({"train": 10**9}, seed=0)
    with pytest.raises(DataError, match="at least 1 puzzle"):
        draw_puzzles({"train": 0}, seed=0)
    with pytest.raises(DataError, match="at least 8"):
        Renderer(4)
