"""The maze as a folder: whole, repeatable at no cost, never mixed up with another one."""

import json

import numpy as np
import pytest

from coconut.data import arrow_maze_files
from coconut.data.arrow_maze import draw_puzzles
from coconut.data.arrow_maze_files import MARKER, ensure_arrow_maze
from coconut.data.image import ImageProcessor
from coconut.data.sample import read_samples
from coconut.data.shards import ShardReader
from coconut.types import DataError

SIZES = {"train": 40, "val": 5, "test": 6, "test_paths": 4}


@pytest.fixture
def folder(tmp_path):
    assert ensure_arrow_maze(tmp_path / "maze", sizes=SIZES)
    return tmp_path / "maze"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_hold_the_puzzles(folder):
    processor = ImageProcessor(image_size=112, max_num_patches=1, use_thumbnail=False, dynamic_preprocess=False)
    for split, puzzles in draw_puzzles(SIZES, seed=0).items():
        reader = ShardReader(folder / "shards" / split)
        assert len(reader) == SIZES[split]
        samples = [reader.read(index) for index in range(len(reader))]
        assert [(s.question, s.steps, s.answer) for s in samples] == [(p.question, p.steps, p.answer) for p in puzzles]
        assert processor.process_image(samples[0].images[0]).shape == (1, 3, 112, 112)


def test_examples_are_a_data_set_of_their_own(folder):
    samples = read_samples(folder / "examples" / "examples.json")
    assert len(samples) == 32
    puzzle = draw_puzzles(SIZES, seed=0)["train"][0]
    assert (samples[0].question, samples[0].steps, samples[0].answer) == (puzzle.question, puzzle.steps, puzzle.answer)


def test_facts_are_written_down(folder):
    facts = json.loads((folder / MARKER).read_text())
    assert facts["complete"] is True
    assert facts["paths"] == {"all": 432, "train, val, test": 389, "test_paths": 43}
    assert sum(facts["answers"]["train"].values()) == 40
    assert facts["floors"]["uniform chance"] == 0.125


def test_made_once_and_the_same_bytes_each_time(folder, tmp_path):
    before = contents(folder)
    assert not ensure_arrow_maze(folder, sizes=SIZES)
    assert ensure_arrow_maze(tmp_path / "again", sizes=SIZES)
    assert contents(folder) == before == contents(tmp_path / "again")


def test_other_settings_are_refused_unless_forced(folder):
    with pytest.raises(DataError, match=r"seed 0 \(asked for: 1\).*--force"):
        ensure_arrow_maze(folder, sizes=SIZES, seed=1)
    assert ensure_arrow_maze(folder, sizes=SIZES, seed=1, force=True)
    assert not ensure_arrow_maze(folder, sizes=SIZES, seed=1)


def test_a_killed_run_is_begun_again(folder, tmp_path, monkeypatch):
    whole = contents(folder)
    written = []

    def killed_at_the_second(samples, out, *args, **kwargs):
        written.append(out)
        if len(written) == 2:
            raise KeyboardInterrupt
        return arrow_maze_files_write(samples, out, *args, **kwargs)

    arrow_maze_files_write = arrow_maze_files.write_shards
    with monkeypatch.context() as patch:
        patch.setattr(arrow_maze_files, "write_shards", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            ensure_arrow_maze(tmp_path / "killed", sizes=SIZES)
    assert json.loads((tmp_path / "killed" / MARKER).read_text())["complete"] is False
    assert ensure_arrow_maze(tmp_path / "killed", sizes=SIZES)
    assert contents(tmp_path / "killed") == whole


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="was not made here"):
        ensure_arrow_maze(tmp_path, sizes=SIZES)
    assert (tmp_path / "shards" / "mine.tar").read_bytes() == b"precious"


def test_pictures_differ_within_a_split(folder):
    reader = ShardReader(folder / "shards" / "val")
    pictures = [np.frombuffer(reader.read(index).images[0], np.uint8).tobytes() for index in range(len(reader))]
    assert len(set(pictures)) == SIZES["val"]
