"""`launch/generate.py`: one question, a conversation, a file of questions; the same answers as evaluation gets."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from coconut.data import open_dataset
from coconut.evaluation.ask import Settings, ask, question
from coconut.evaluation.evaluate import evaluate
from coconut.evaluation.loaded import Loaded, load
from coconut.evaluation.result import EvaluationOptions
from coconut.types import DataError
from launch import generate as script

from .conftest import Maze


@pytest.fixture(scope="module")
def loaded(maze: Maze) -> Loaded:
    return load(maze.checkpoints[4])


@pytest.fixture
def pictures(maze: Maze, tmp_path: Path) -> list[Path]:
    source = open_dataset(maze.shards)
    paths = []
    for index in range(3):
        image = source.read(index).images[0]
        assert isinstance(image, bytes)
        paths.append(tmp_path / f"{index}.png")
        paths[-1].write_bytes(image)
    return paths


def test_a_question_is_asked_as_evaluation_asks_it(maze: Maze, loaded: Loaded) -> None:
    source = open_dataset(maze.shards)
    samples = [source.read(i) for i in range(6)]
    said = ask(loaded, samples, Settings(max_new_tokens=4))
    result = evaluate(
        loaded.model,
        source,
        encoder=loaded.encoder,
        collator=loaded.collator,
        tokenizer=loaded.tokenizer,
        spec=loaded.spec,
        options=EvaluationOptions(max_new_tokens=4, limit=6),
    )
    assert [r.text for r in said] == [p.prediction for p in result.predictions]
    assert [(r.n_generated, r.n_latents) for r in said] == [(p.n_generated, 4) for p in result.predictions]
    fewer = ask(loaded, samples, Settings(max_new_tokens=4, n_latents=0))
    assert [r.text for r in fewer] != [r.text for r in said]
    with pytest.raises(DataError, match="question is empty"):
        question("  ", [])


def test_a_file_is_answered_record_by_record(maze: Maze, pictures: list[Path], tmp_path: Path) -> None:
    records = [
        {"question": "start a1 ?", "image": "0.png", "note": "kept"},
        {"question": "start a2 ?", "image": "nowhere.png"},
        {"image": "1.png"},
        {"question": "start a4 ?", "image": "2.png", "id": 7},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--checkpoint", str(maze.checkpoints[4]), "--input", str(source), "--max-new-tokens", "3"]
    assert script.main([*words, "--output", str(out), "--batch-size", "3"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0]["note"] == "kept"
    assert {"prediction", "predicted_answer"} <= lines[0].keys()
    assert lines[3]["prediction"]
    assert "nowhere.png" in lines[1]["error"]
    assert "'question' is missing" in lines[2]["error"]


def test_one_question_streams_what_asking_returns(
    maze: Maze, loaded: Loaded, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(maze.checkpoints[4].parent / "stage_4"), "--max-new-tokens", "4"]
    assert script.main([*words, "--image", str(pictures[0]), "--question", "start a1 ?"]) == 0
    (reply,) = ask(loaded, [question("start a1 ?", [str(pictures[0])])], Settings(max_new_tokens=4))
    assert capsys.readouterr().out.split() == reply.text.split()


def test_a_conversation_survives_mistakes(
    maze: Maze,
    loaded: Loaded,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = f":image nowhere.png\nstart a1 ?\n:image {pictures[1]}\n:latents x\n:latents 2\nstart a1 ?\n:what\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    script.converse(loaded, [], Settings(max_new_tokens=4))
    said = capsys.readouterr().out
    (reply,) = ask(loaded, [question("start a1 ?", [str(pictures[1])])], Settings(max_new_tokens=4, n_latents=2))
    assert "nowhere.png" in said
    assert ":latents x: give a number" in said
    assert " ".join(reply.text.split()) in " ".join(said.split())
    assert ":quit" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "nowhere.jsonl", "--output", "x"], "--input nowhere.jsonl is no file"),
        (["--input", "x"], "belong together"),
        (["--question", "?", "--image", "nowhere.png"], "--image nowhere.png is no file"),
        (["--question", "?", "--latents", "-1"], "--latents is -1"),
        (["--question", "?", "--latents", "100000"], "100000 latents are more than fit"),
    ],
)
def test_a_mistake_gives_one_line(
    words: list[str], message: str, maze: Maze, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--checkpoint", str(maze.checkpoints[4]), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
