"""Converters, on small files of the public layouts, through the command line that a user types."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coconut.data.converters.text import sentences
from coconut.data.sample import read_samples
from coconut.types import Sample

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "prepare_data.py"


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def convert(main, tmp_path) -> Callable[..., list[Sample]]:
    def run(name: str, *arguments: str, split: str = "train") -> list[Sample]:
        out = tmp_path / "out"
        assert main([name, "--from", str(tmp_path), "--out", str(out), "--split", split, *arguments]) == 0
        return read_samples(out / f"{split}.json")

    return run


@pytest.fixture
def fails(main, tmp_path, capsys) -> Callable[..., str]:
    def run(name: str, *arguments: str) -> str:
        assert main([name, "--from", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert not list((tmp_path / "out").glob("*.json"))
        return error

    return run


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


AOKVQA = {
    "split": "train",
    "image_id": 299207,
    "question_id": "22MexNkBPpdZGX6sxbxVBH",
    "question": "What is the man by the bags awaiting?",
    "choices": ["skateboarder", "train", "delivery", "cab"],
    "correct_choice_idx": 3,
    "direct_answers": ["ride", "bus", "cab", "taxi", "cab"],
    "difficult_direct_answer": False,
    "rationales": ["He stands by the road. He has bags.", "A train would not stop here.", "Cabs stop there."],
}


@pytest.fixture
def aokvqa(tmp_path, picture) -> list[str]:
    write(tmp_path / "aokvqa_v1p0_train.json", [AOKVQA])
    write(tmp_path / "coco" / "train2017" / "000000299207.jpg", picture(8, 6, fmt="JPEG"))
    return ["--coco", str(tmp_path / "coco")]


def test_aokvqa_multiple_choice(convert, aokvqa, tmp_path) -> None:
    (sample,) = convert("aokvqa", *aokvqa)
    assert sample.question == f"{AOKVQA['question']}\nA. skateboarder\nB. train\nC. delivery\nD. cab"
    assert (sample.answer, sample.key, sample.choices) == ("D", AOKVQA["question_id"], tuple(AOKVQA["choices"]))
    assert sample.steps == ("He stands by the road.", "He has bags.")
    assert Path(str(sample.images[0])).samefile(tmp_path / "coco" / "train2017" / "000000299207.jpg")


def test_aokvqa_direct_and_each_rationale(convert, aokvqa) -> None:
    samples = convert("aokvqa", *aokvqa, "--answers", "direct", "--rationales", "each")
    assert [sample.steps for sample in samples] == [(text,) for text in AOKVQA["rationales"]]
    assert {(sample.question, sample.answer) for sample in samples} == {(AOKVQA["question"], "cab")}
    assert len({sample.key for sample in samples}) == 3
    assert convert("aokvqa", *aokvqa, "--rationales", "first")[0].steps == (AOKVQA["rationales"][0],)


def test_aokvqa_without_answers_or_images(fails, aokvqa, tmp_path) -> None:
    assert "has no answers" in fails("aokvqa", *aokvqa, "--split", "test")
    assert "holds none of aokvqa_v1p0_val.json" in fails("aokvqa", *aokvqa, "--split", "val")
    (tmp_path / "coco" / "train2017" / "000000299207.jpg").unlink()
    assert "000000299207.jpg does not exist" in fails("aokvqa", *aokvqa)
    write(tmp_path / "aokvqa_v1p0_train.json", [AOKVQA | {"correct_choice_idx": None}])
    assert "no correct_choice_idx" in fails("aokvqa", *aokvqa)


def test_scienceqa(convert, tmp_path, picture) -> None:
    problem = {
        "question": "Which is north?",
        "choices": ["Maine", "Ohio"],
        "answer": 0,
        "hint": "Look at the map.",
        "image": "image.png",
        "lecture": "Maps have four directions.",
        "solution": "Find the compass.\nMaine is farthest north.",
        "split": "train",
    }
    text = problem | {"image": None, "hint": "", "answer": 1, "lecture": ""}
    write(tmp_path / "problems.json", {"1": problem, "2": problem | {"split": "test"}, "7": text})
    write(tmp_path / "images" / "train" / "1" / "image.png", picture())
    first, second = convert("scienceqa", "--lecture")
    assert first.question == "Look at the map.\nWhich is north?\nA. Maine\nB. Ohio"
    assert first.steps == ("Maps have four directions.", "Find the compass.", "Maine is farthest north.")
    assert (first.key, first.answer, len(first.images)) == ("1", "A", 1)
    assert (second.key, second.answer, second.images) == ("7", "B", ())
    assert len(convert("scienceqa")[0].steps) == 2


def test_m3cot(convert, fails, tmp_path, picture) -> None:
    row = {
        "id": "science-1",
        "category": "c",
        "image_id": "science-1",
        "question": "What is it?",
        "choices": ["a cat", "a dog"],
        "context": "In the house.",
        "answer": "B",
        "rationale": "It barks. So it is a dog.",
        "image": "science-1.png",
        "domain": "science",
        "topic": "t",
    }
    write(tmp_path / "data" / "dev.jsonl", json.dumps(row) + "\n")
    write(tmp_path / "images" / "science-1.png", picture())
    (sample,) = convert("m3cot", split="val")
    assert sample.question == "In the house.\nWhat is it?\nA. a cat\nB. a dog"
    assert (sample.answer, sample.steps) == ("B", ("It barks.", "So it is a dog."))
    (tmp_path / "out" / "val.json").unlink()
    write(tmp_path / "data" / "dev.jsonl", json.dumps(row | {"answer": "E"}))
    assert "dev.jsonl:0: the right choice is number 4 of 2" in fails("m3cot", "--split", "val")


def test_llava_cot(convert, fails, tmp_path, picture) -> None:
    parts = {"SUMMARY": "S.", "CAPTION": "C.", "REASONING": "R.\nR2.", "CONCLUSION": "4"}
    reply = "\n\n".join(f"<{name}> {text} </{name}>" for name, text in parts.items())
    turns = [
        {"from": "human", "value": "<image>\nHow many?"},
        {"from": "gpt", "value": reply},
        {"from": "human", "value": "And red ones?"},
        {"from": "gpt", "value": reply.replace("4", "1")},
    ]
    row = {"id": "clevr_1", "image": "CLEVR/1.png", "conversations": turns}
    write(tmp_path / "train.jsonl", json.dumps(row))
    write(tmp_path / "CLEVR" / "1.png", picture())
    first, second = convert("llava-cot")
    assert (first.question, first.steps, first.answer) == ("How many?", ("S.", "C.", "R.\nR2."), "4")
    assert (second.question, second.answer, second.key) == ("How many?\n4\nAnd red ones?", "1", "clevr_1-1")
    (tmp_path / "out" / "train.json").unlink()
    turns[1]["value"] = "4"
    write(tmp_path / "train.jsonl", json.dumps(row))
    assert "reply 0 has no <CONCLUSION>" in fails("llava-cot")


def test_gsm8k(convert, fails, tmp_path) -> None:
    write(tmp_path / "train.txt", "Eggs?||<<16-3-4=9>> <<9*2=18>> #### 1,800\n\nNone?|| #### 5\n")
    first, second = convert("gsm8k-aug")
    assert (first.question, first.steps, first.answer) == ("Eggs?", ("<<16-3-4=9>>", "<<9*2=18>>"), "1800")
    assert (second.steps, second.answer) == ((), "5")
    write(tmp_path / "gsm_valid.json", [{"question": "Q", "steps": ["<<1+1=2>>"], "answer": "2"}])
    assert convert("gsm8k-aug", split="val")[0].steps == ("<<1+1=2>>",)
    (tmp_path / "out" / "train.json").unlink()
    (tmp_path / "out" / "val.json").unlink()
    write(tmp_path / "train.txt", "no bar\n")
    assert "train.txt, line 1: not of the form" in fails("gsm8k-aug")


PROSQA = {
    "question": "Tom is a terpus. Every terpus is a lempus. Every lempus is a rompus. Is Tom a rompus or scrompus?",
    "steps": ["Tom is a terpus.", "Every terpus is a lempus.", "Every lempus is a rompus."],
    "answer": "Tom is a rompus.",
    "idx_to_symbol": ["Tom", "terpus", "lempus", "rompus", "scrompus"],
    "edges": [[0, 1], [1, 2], [2, 3]],
    "root": 0,
    "target": 3,
    "neg_target": 4,
}


def test_prosqa_of_the_public_layout(convert, fails, tmp_path) -> None:
    write(tmp_path / "prosqa_valid.json", [PROSQA])
    (text,) = convert("prosqa", split="val")
    assert (text.question, list(text.steps), text.answer) == (PROSQA["question"], PROSQA["steps"], PROSQA["answer"])
    (drawn,) = convert("prosqa", "--picture", split="val")
    assert drawn.question == "Is Tom a rompus or scrompus?"
    assert len(drawn.images) == 1
    (tmp_path / "out" / "val.json").unlink()
    assert "use --generate" in fails("prosqa")
    assert "--nodes, --even decide what --generate draws" in fails("prosqa", "--even", "--nodes", "12")
    assert "leave out --picture" in fails("prosqa", "--generate", "--recite", "--picture")
    assert "--limit is -4" in fails("prosqa", "--generate", "--limit", "-4")


def test_columns_of_json_and_a_missing_one(main, tmp_path, capsys) -> None:
    write(tmp_path / "any.jsonl", '{"q": "Why?", "why": "One. Two.", "a": 3, "uid": 7}\n')
    arguments = ["columns", "--from", str(tmp_path / "any.jsonl"), "--out", str(tmp_path / "out")]
    named = ["--question", "q", "--steps", "why", "--answer", "a", "--id", "uid"]
    assert main([*arguments, *named]) == 0
    (sample,) = read_samples(tmp_path / "out" / "train.json")
    assert (sample.key, sample.question, sample.steps, sample.answer) == ("7", "Why?", ("One.", "Two."), "3")
    assert main([*arguments, *named[:-1], "nope"]) == 2
    assert "field 'nope' is missing; the row has 'q', 'why', 'a', 'uid'" in capsys.readouterr().err


def test_columns_of_parquet_with_its_images(main, tmp_path, picture) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"q": "Q", "r": ["s"], "a": "A", "img": {"bytes": picture(9, 7), "path": "x.png"}},
        {"q": "Q", "r": [], "a": "A", "img": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "any.parquet")
    arguments = ["--question", "q", "--steps", "r", "--answer", "a"]
    assert main(["columns", "--from", str(tmp_path / "any.parquet"), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert read_samples(tmp_path / "out" / "train.json")[0].images == ()  # no column named: none taken
    rows[1]["img"] = rows[0]["img"]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "any.parquet")
    arguments += ["--image", "img"]
    assert main(["columns", "--from", str(tmp_path / "any.parquet"), "--out", str(tmp_path / "out"), *arguments]) == 0
    samples = read_samples(tmp_path / "out" / "train.json")
    assert [Path(str(sample.images[0])).read_bytes() for sample in samples] == [picture(9, 7)] * 2


def test_without_optional_packages_the_error_names_them(fails, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "the package datasets is needed" in fails("aokvqa", "--hub")


def test_sentences_end_where_a_reader_would_end_them() -> None:
    text = 'Mr. Fox has 3.5 apples. J. Doe has e.g. Two! "Why?" Nobody knows'
    assert sentences(text) == ("Mr. Fox has 3.5 apples.", "J. Doe has e.g. Two!", '"Why?" Nobody knows')
    assert sentences("one\n\n two.") == ("one", "two.")
