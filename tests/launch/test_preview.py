"""The preview shows the batches that training gets, as one page and as text."""

from __future__ import annotations

import html
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from coconut.types import IGNORE_INDEX
from launch.preview import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights, and 24 records with pictures of several sizes."""
    from coconut.data.arrow_maze import vocabulary
    from coconut.model.tiny import build_tiny_internvl, build_word_tokenizer, save_tiny

    folder = tmp_path_factory.mktemp("preview")
    tokenizer = build_word_tokenizer(vocabulary())
    save_tiny(build_tiny_internvl(tokenizer, image_size=28), tokenizer, folder / "model")
    (folder / "model" / "model.safetensors").write_bytes(b"these are no weights")
    records = []
    for i in range(24):
        record = {
            "id": f"k{i}",
            "question": "start a4 ?",
            "steps": ["blue up a3", "red left b3"][: i % 3],
            "answer": "red",
        }
        if i % 4:
            Image.new("RGB", (30 * (i % 4), 40), (10 * i, 0, 99)).save(folder / f"{i}.png")
            record["image"] = f"{i}.png"
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def arguments(folder, tmp_path, monkeypatch, project) -> list[str]:
    monkeypatch.chdir(project)
    return [
        "--output", str(tmp_path / "page"), f"model_id={folder / 'model'}", f"train_data_path={folder / 'data.json'}",
        "val_data_path=null", "test_data_path=null", "advance_at=null", f"save_path={tmp_path}", "image_size=28",
        "dynamic_preprocess=true", "max_num_patches=4", "use_thumbnail=true", "samples_per_epoch=null",
        "global_batch_size=null", "batch_size_training=6", "uniform_prob=0",
    ]  # fmt: skip


def training_batches(arguments: list[str], stage: int) -> list:
    """What a run would be given, made here by the run's own code."""
    from coconut.config import load_config
    from coconut.training.preview import open_preview

    config = load_config("args/demo.yaml", overrides=[one for one in arguments if "=" in one])
    opened = open_preview(config)
    loader = opened.inputs.train_loader(stage, opened.epoch_of(stage), 0, opened.geometry(1), 1)
    return [opened, *loader]


@pytest.mark.parametrize("stage", [0, 2])
def test_rows_are_those_of_the_training_batches(arguments, tmp_path, capsys, stage: int) -> None:
    assert main([*arguments, "--stage", str(stage), "--samples", "9"]) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "page" / "index.html").read_text()
    opened, first, second, *_ = training_batches(arguments, stage)
    keys = (*first.keys, *second.keys)[:9]
    assert re.findall(r"<h3>(k\d+) ", page) == list(keys)
    tokens = 0
    for place, article in enumerate(page.split("<article")[1:]):
        batch, row = (first, place) if place < 6 else (second, place - 6)
        labels, ids = batch.tensors["labels"][row], batch.tensors["input_ids"][row]
        expected = opened.tokenizer.decode(ids[labels != IGNORE_INDEX])
        shown = re.findall(r'<span class="t label" title="(\d+) label tokens">(.*?)</span>', article, re.DOTALL)
        assert [(int(count), html.unescape(text).replace("↵", "")) for count, text in shown] == [
            (int((labels != IGNORE_INDEX).sum()), expected)
        ]
        thoughts = [int(count) for count in re.findall(r"thought × (\d+)<", article)]
        assert sum(thoughts) == int((ids == opened.inputs.latent_ids[1]).sum())
        tokens += sum(int(count) for count in re.findall(r'title="(\d+) \w+ tokens"', article))
    assert tokens == 6 * first.tensors["input_ids"].shape[1] + 3 * second.tensors["input_ids"].shape[1]
    assert ("thought ×" in page) == (stage > 0)
    assert all(key in said for key in keys)
    assert ("[thought × " in said) == (stage > 0) and "### red <eos>}" in said


def test_pictures_show_the_tiles_that_the_model_gets(arguments, tmp_path) -> None:
    from base64 import b64decode

    assert main([*arguments, "--stage", "1", "--samples", "6"]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    _, batch, *_ = training_batches(arguments, 1)
    patches = batch.tensors["num_patches"].tolist()
    pixels = batch.tensors["pixel_values"].split(patches)
    sources = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    assert len(sources) == sum(count > 0 for count in patches)
    shown = iter(Image.open(io.BytesIO(b64decode(source))).convert("RGB") for source in sources)
    for tiles, count in zip(pixels, patches, strict=True):
        if count:
            colour = tiles[0, :, 14, 14].tolist()  # these pictures have one colour; a large one is shown as JPEG
            drawn = max(next(shown).getcolors(1 << 20), key=lambda pair: pair[0])[1]
            assert drawn == pytest.approx(colour, abs=3)


def test_the_page_needs_no_other_file(arguments, tmp_path) -> None:
    assert main([*arguments, "--stats", "--ranks", "2", "--samples", "2"]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["index.html"]
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"<script|<link|srcset|href|url\(|@import", page)


def test_statistics_are_those_of_index_and_plan(arguments, tmp_path, capsys) -> None:
    from coconut.training.preview_stats import balances, histograms

    opened, *_ = training_batches([*arguments, "balance=cost"], 0)
    sizes = {one.name: one for one in histograms(opened)}
    steps = [i % 3 for i in range(24)]
    assert sizes["written steps"].counts == [steps.count(n) for n in range(3)]
    assert sum(sizes["patches"].counts) == sum(sizes["tokens"].counts) == 24
    rows = {one.name: one for one in balances(opened, 2)}
    assert [name for name, one in rows.items() if one.is_used] == ["cost"]
    assert opened.config.balance == "cost"
    assert rows["none"].balance.cost_mean > rows["count"].balance.cost_mean >= 1
    plan = opened.inputs.train_loader(0, 0, 0, opened.geometry(2), 2).plan
    costs = [[float(opened.train.tokens_N[slot].sum()) for slot in plan.step(step)] for step in range(len(plan))]
    ratio = torch.tensor([2 * max(pair) / sum(pair) for pair in costs]).mean()
    assert rows["cost"].balance.cost_mean == pytest.approx(float(ratio), rel=1e-5)
    assert main([*arguments, "balance=cost", "--stats", "--ranks", "2"]) == 0
    said = capsys.readouterr().out
    assert f"cost (this run)  {rows['cost'].balance.cost_mean:.3f}" in said


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--stage", "9"], "stage is 9; this run has 0, 1, 2, 3, 4"),
        (["--samples", "0"], "--samples is 0"),
        (["train_data_path=nowhere.json"], "nowhere.json"),
        (["model_id=nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_mistakes_are_one_error(arguments, capsys, extra, message: str) -> None:
    assert main([*arguments, *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_text_from_data_cannot_become_markup(arguments, folder, tmp_path) -> None:
    hostile = tmp_path / "hostile.json"
    record = {"id": "<b>k</b>", "question": "<script>alert(1)</script>", "steps": [], "answer": "<img src=x>"}
    hostile.write_text(json.dumps([record] + [record | {"id": f"{i}"} for i in range(2)]))
    assert main([*arguments, f"train_data_path={hostile}"]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "<script" not in page and "<b>k</b>" not in page and "<img src=x>" not in page


def test_help_comes_at_once(project) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "launch/preview.py", "--help"],
        cwd=project,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--stats" in done.stdout
    assert time.monotonic() - started < 2
