"""`launch/generate.py`: one question, a conversation, a file of questions; the same answers as evaluation gets."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from coconut.data import open_dataset
from coconut.evaluation.ask import Settings, ask, question
from coconut.evaluation.evaluate import evaluate
from coconut.evaluation.loaded import Loaded, load
from coconut.evaluation.result import EvaluationOptions
from coconut.types import ConfigError, DataError
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


def test_records_come_out_as_they_are(
    maze: Maze, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"question": "start a1 ?", "image": "0.png", "error": "of an earlier time"},
        {"question": "start a2 ?", "image": "1.png", "answer": None, "steps": None},
        {"question": "start a4 ?", "image": "2.png", "note": "half a pair: \ud83d"},
        {"question": "start a1 ? " * 600, "image": "2.png", "note": "für alle"},
    ]
    source, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(records))
    words = ["--checkpoint", str(maze.checkpoints[4]), "--input", str(source), "--max-new-tokens", "3"]
    assert script.main([*words, "--output", str(out)]) == 0
    assert "3 answered, 1 could not be asked" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line.get("error", "")[-90:].count("reads 256 at most") for line in lines] == [0, 0, 0, 1]
    assert lines[1]["answer"] is None and lines[2]["note"] == records[2]["note"]
    assert "für alle" in out.read_text(encoding="utf-8")


def test_thoughts_are_refused_where_there_were_none(loaded: Loaded) -> None:
    unthinking = replace(loaded, spec=replace(loaded.spec, markers=False, n_latents=0, method="no_cot"))
    with pytest.raises(ConfigError, match=r"trained without thoughts \(no_cot\)"):
        ask(unthinking, [question("start a1 ?", [])], Settings(n_latents=3))


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
    pictures[1] = pictures[1].rename(pictures[1].with_name("my maze.png"))
    typed = f":image nowhere.png\n:image '{pictures[1]}\n:image '{pictures[1]}'\n:latents x\n:latents 2\nstart a1 ?\n"
    typed += ":what\n:latents 250\nstart a1 ?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    script.converse(loaded, [], Settings(max_new_tokens=4))
    said = capsys.readouterr().out
    (reply,) = ask(loaded, [question("start a1 ?", [str(pictures[1])])], Settings(max_new_tokens=4, n_latents=2))
    assert ":image nowhere.png is no file" in said
    assert "No closing quotation" in said
    assert "the model reads 256 at most" in said
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
        (["--question", "?", "--latents", "250"], "the model reads 256 at most"),
        (["--question", "?", "--temperature", "nan"], "--temperature is nan"),
        (["--question", "?", "--temperature", "1e-300"], "give 0, the likeliest token"),
        (["--question", "?", "--seed", "99999999999"], "--seed is 99999999999"),
        (["--input", __file__, "--output", "."], "--output . is a folder"),
        (["--input", __file__, "--output", "/proc/x/o.jsonl"], "cannot write to /proc"),
    ],
)
def test_a_mistake_gives_one_line(
    words: list[str], message: str, maze: Maze, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--checkpoint", str(maze.checkpoints[4]), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
