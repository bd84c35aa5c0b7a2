"""The adapter for lmms-eval, against the package itself: requests one by one, and its own command on a small task."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coconut.data import open_dataset
from coconut.evaluation.ask import Settings, ask
from coconut.evaluation.evaluate import evaluate
from coconut.evaluation.loaded import load
from coconut.evaluation.result import EvaluationOptions
from coconut.types import CheckpointError, ConfigError

from .conftest import ListSource, Maze

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval: see docs/use.md"),
    pytest.mark.slow,
]

TASK = """
task: coconut_maze
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_visual: !function maze_utils.pictures
doc_to_text: question
doc_to_target: {target}
{choices}
generation_kwargs: {{until: ["\\n\\n"], max_new_tokens: 4, temperature: 0, do_sample: false, num_beams: 1, top_p: 1.0}}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata: {{version: 0}}
"""
UTILS = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""
COLOURS = ["red", "green", "blue", "yellow"]
N = 6


def build(maze: Maze, **arguments: Any) -> Any:
    from coconut.evaluation.lmms_eval_model import CoconutLmms

    return CoconutLmms(str(maze.checkpoints[4]), **arguments)


def requests(model: Any, maze: Maze, kind: str, *arguments: Any) -> list[Any]:
    """lmms-eval's own requests for the first puzzles, as its task class builds them."""
    from lmms_eval.api.instance import Instance

    source = open_dataset(maze.shards)
    docs = [source.read(i) for i in range(N)]
    model.task_dict["maze"] = {"test": docs}

    def pictures(doc: Any) -> list[Image.Image]:
        return [Image.open(io.BytesIO(doc.images[0]))]

    return [
        Instance(
            request_type=kind, arguments=(doc.question, argument, pictures, row, "maze", "test"), idx=0,
            metadata={"task": "maze", "doc_id": row, "repeats": 1},
        )
        for row, doc in enumerate(docs)
        for argument in arguments
    ]  # fmt: skip


def _pairs(model: Any, asked: list[Any]) -> list[tuple[float, bool]]:
    from lmms_eval.api.instance import unwrap_generation_output

    return [unwrap_generation_output(result)[0] for result in model.loglikelihood(asked)]


def test_it_generates_what_asking_does(maze: Maze) -> None:
    loaded, source = load(maze.checkpoints[4]), open_dataset(maze.shards)
    samples = [source.read(i) for i in range(N)]
    for latents, whole in ((None, True), (None, False), (2, False)):
        model = build(maze, batch_size=4, latents=latents, whole_text=whole)
        said = model.generate_until(requests(model, maze, "generate_until", {"max_new_tokens": 4}))
        expected = ask(loaded, samples, Settings(4, latents))
        assert [r.text for r in said] == [r.text if whole else r.answer or r.text for r in expected]
        assert [r.token_counts.output_tokens for r in said] == [r.n_generated for r in expected]


def test_a_text_ends_before_what_the_task_names(maze: Maze) -> None:
    model = build(maze, batch_size=4, whole_text=True)
    said = model.generate_until(requests(model, maze, "generate_until", {"max_new_tokens": 4}))
    stop = said[0].text.split()[-1]
    cut = model.generate_until(requests(model, maze, "generate_until", {"max_new_tokens": 4, "until": [stop]}))
    assert cut[0].text == said[0].text.split(stop)[0]


def test_likelihoods_are_those_of_evaluating_choices(maze: Maze) -> None:
    from dataclasses import replace

    loaded, source = load(maze.checkpoints[4]), open_dataset(maze.shards)
    samples = [replace(source.read(i), choices=tuple(COLOURS), answer=COLOURS[0]) for i in range(N)]
    result = evaluate(
        loaded.model,
        ListSource(samples),
        encoder=loaded.encoder,
        collator=loaded.collator,
        tokenizer=loaded.tokenizer,
        spec=loaded.spec,
        options=EvaluationOptions(metric="choice", by="likelihood"),
    )
    model = build(maze, batch_size=5)
    found = _pairs(model, requests(model, maze, "loglikelihood", *(f" {colour}" for colour in COLOURS)))
    nats = [pytest.approx(value, abs=1e-4) for p in result.predictions for value in p.choice_nats or ()]
    assert [-loss for loss, _ in found] == nats  # a task of choices takes the least
    asked = requests(model, maze, "loglikelihood", lambda doc: COLOURS[2])
    assert [likelihood for likelihood, _ in _pairs(model, asked)] == nats[2::4]


def test_a_continuation_that_greedy_decoding_writes_is_known(maze: Maze) -> None:
    model = build(maze, batch_size=2, whole_text=True)
    asked = requests(model, maze, "generate_until", {"max_new_tokens": 2})
    said = [reply.text for reply in model.generate_until(asked)]
    mine = requests(model, maze, "loglikelihood", "x")
    for request, text in zip(mine, said, strict=True):
        request.arguments = (request.args[0], text, *request.args[2:])
    assert all(greedy for _, greedy in _pairs(model, mine))
    others = requests(model, maze, "loglikelihood", "a1 a1 a1")
    assert not any(greedy for _, greedy in _pairs(model, others))


def test_what_cannot_be_done_is_refused(maze: Maze, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size is auto"):
        build(maze, batch_size="auto")
    with pytest.raises(ConfigError, match="latents is -1"):
        build(maze, latents=-1)
    with pytest.raises(CheckpointError, match="does not exist"):
        build(Maze(maze.shards, {4: tmp_path / "nowhere"}))
    model = build(maze)
    with pytest.raises(ConfigError, match=r"'num_beams': 5.*--gen_kwargs"):
        model.generate_until(requests(model, maze, "generate_until", {"num_beams": 5}))
    asked = requests(model, maze, "generate_until", {})
    asked[0].arguments = (*asked[0].args[:2], lambda doc: [{"array": [0.0]}], *asked[0].args[3:])
    with pytest.raises(ConfigError, match="pictures only"):
        model.generate_until(asked)


@pytest.mark.parametrize("kind", ["generate_until", "multiple_choice"])
def test_the_packages_own_command_finds_and_runs_it(maze: Maze, tmp_path: Path, kind: str) -> None:
    model = build(maze, batch_size=4)
    replies = model.generate_until(requests(model, maze, "generate_until", {"max_new_tokens": 4}))
    pairs = _pairs(model, requests(model, maze, "loglikelihood", *(f" {colour}" for colour in COLOURS)))
    losses = [[loss for loss, _ in pairs[row * 4 : row * 4 + 4]] for row in range(N)]
    records = []
    for row, sample in enumerate(model.task_dict["maze"]["test"]):
        path = tmp_path / f"{row}.png"
        path.write_bytes(sample.images[0])
        # An untrained model is right about every other one when the truth there is what it says itself.
        likeliest = min(range(4), key=losses[row].__getitem__)
        answer, label = (replies[row].text, likeliest) if row % 2 else ("nothing", (likeliest + 1) % 4)
        records.append({"question": sample.question, "image": str(path), "answer": answer, "label": label})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    generated = kind == "generate_until"
    target, metric = ("answer", "exact_match") if generated else ("label", "acc")
    choices = "" if generated else f"doc_to_choice: {COLOURS}"
    (tasks / "maze.yaml").write_text(
        TASK.format(data=tmp_path / "data.jsonl", kind=kind, target=target, choices=choices, metric=metric)
    )
    (tasks / "maze_utils.py").write_text(UTILS)
    words = ["--model", "coconut", "--model_args", f"pretrained={maze.checkpoints[4]}", "--tasks", "coconut_maze"]
    command = [sys.executable, "-m", "lmms_eval", *words, "--include_path", str(tasks), "--batch_size", "4"]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(path.read_text())["results"]["coconut_maze"]
    assert results["exact_match,none" if generated else "acc,none"] == 0.5
