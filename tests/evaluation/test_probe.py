"""Probing a real (random) model: what each change does, that it does nothing else, and the page that comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coconut.data import open_dataset
from coconut.data.arrow_maze import COLOUR_NAMES, Puzzle, Renderer, draw_puzzles, to_samples
from coconut.evaluation import probe_maze, probe_words
from coconut.evaluation.interventions import donors_within, given_thoughts, only_thoughts, other_order, thought_numbers
from coconut.evaluation.loaded import Loaded, load
from coconut.evaluation.probe import Condition, Study, conditions, cut, effects
from coconut.evaluation.probe_look import looks, paint
from coconut.evaluation.probe_page import verdict
from coconut.evaluation.thoughts import answer, likelihood, think
from coconut.types import DataError, Sample
from launch import probe as script

from .conftest import ListSource, Maze

LATENT = 7


@pytest.fixture(scope="module")
def loaded(maze: Maze) -> Loaded:
    return load(maze.checkpoints[4])


@pytest.fixture(scope="module")
def study(maze: Maze, loaded: Loaded) -> Study:
    return Study(loaded, open_dataset(maze.shards), limit=None, batch_size=10, max_new_tokens=5, seed=0)


@pytest.fixture(scope="module")
def ragged(maze: Maze, loaded: Loaded) -> Study:
    """Questions of unequal length with one to four thoughts."""
    source = open_dataset(maze.shards)
    samples = [source.read(i) for i in range(6)]
    cut_short = [
        replace(s, steps=s.steps[: 1 + i % 4], question=s.question + " ?" * (i % 3)) for i, s in enumerate(samples)
    ]
    return Study(loaded, ListSource(cut_short), limit=None, batch_size=6, max_new_tokens=5, seed=0)


def test_thinking_and_answering_apart_says_what_generate_says(ragged: Study) -> None:
    (batch,) = ragged.batches
    said = answer(ragged.model, think(ragged.model, batch), 5)
    tensors = {k: v for k, v in batch.tensors.items() if k != "image_flags"}
    ids = ragged.model.generate(**tensors, wrap_prompt=False, do_sample=False, max_new_tokens=5).tolist()
    eos = ragged.model.eos_token_id
    assert said == [row[: row.index(eos)] if eos in row else row for row in ids]
    assert [len(t) for t in ragged.thoughts] == [1, 2, 3, 4, 1, 2]


def test_the_likelihood_is_that_of_the_answers_labels(ragged: Study) -> None:
    (batch,) = ragged.batches
    found = likelihood(ragged.model, think(ragged.model, batch), batch)
    for row, feature in enumerate(ragged.features):
        labels = feature["labels"].clone()
        labels[: len(labels) - len(feature["text"].answer)] = -100
        loss = ragged.model(
            input_ids=feature["input_ids"][None],
            labels=labels[None],
            pixel_values=feature["pixel_values"],
            num_items_in_batch=1.0,
        ).loss
        assert found[row] == pytest.approx(-float(loss), rel=1e-4, abs=1e-4)


def test_feeding_back_its_own_thoughts_changes_nothing_and_others_change_much(ragged: Study) -> None:
    own = ragged.run(Condition("own", ""))
    same = ragged.run(Condition("same", "", transform=ragged.fed(lambda row: ragged.thoughts[row])))
    assert same.nats == pytest.approx(own.nats, abs=1e-4)
    assert same.answers == own.answers
    zeros = ragged.run(Condition("z", "", transform=ragged.fed(lambda row: 0 * ragged.thoughts[row])))
    assert not np.allclose(zeros.nats, own.nats, atol=1e-2)


def test_cutting_thoughts_is_dropping_their_keys_and_values(study: Study) -> None:
    batch = study.batches[0]
    memory = think(study.model, batch)
    hidden = cut()(memory, batch)
    kept = ~batch.latent_mask[0]  # every row has its thoughts in the same columns
    dropped = replace(
        memory,
        layers=tuple((k[:, :, kept], v[:, :, kept]) for k, v in memory.layers),
        mask_BC=memory.mask_BC[:, kept],
    )
    assert likelihood(study.model, hidden, batch) == pytest.approx(likelihood(study.model, dropped, batch), abs=1e-4)
    assert likelihood(study.model, hidden, batch) != pytest.approx(likelihood(study.model, memory, batch), abs=1e-2)
    one = cut([1])(memory, batch)
    assert (memory.mask_BC - one.mask_BC).sum(1).tolist() == [1] * 10


def test_changing_the_image_after_thinking_keeps_the_thoughts(study: Study) -> None:
    by_name = {c.name: c for c in conditions(study)}
    after, before = by_name["image_after"], by_name["image"]
    assert after.edit is not None
    assert before.donors is not None
    batch = study.batches[0]
    memory = think(study.model, batch)
    edited = after.edit(memory, batch)
    other = think(study.model, study.with_images_of(batch, before.donors))
    image = torch.eq(batch.tensors["input_ids"][:, :-1], study.model.backbone.image_token_id or -1)[0]
    for (keys, _), (own, _), (theirs, _) in zip(edited.layers, memory.layers, other.layers, strict=True):
        assert torch.equal(keys[:, :, image], theirs[:, :, image])
        assert torch.equal(keys[:, :, ~image], own[:, :, ~image])


def test_the_table_pairs_each_condition_with_its_own_thoughts(study: Study) -> None:
    planned = [c for c in conditions(study) if c.name in ("own", "zeros", "cut_2")]
    outcomes = {c.name: study.run(c) for c in planned}
    rows = {row["name"]: row for row in effects(planned, outcomes, 0)}
    own = rows["own"]
    assert own["change"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 24}
    zeros = rows["zeros"]
    assert zeros["nats_change"]["mean"] == pytest.approx(zeros["nats"] - own["nats"])
    assert zeros["nats_change"]["low"] <= zeros["nats_change"]["mean"] <= zeros["nats_change"]["high"]
    assert rows["cut_2"]["thought"] == 1


def test_numbers_do_not_depend_on_the_batch(maze: Maze, loaded: Loaded, study: Study) -> None:
    other = Study(loaded, open_dataset(maze.shards), limit=None, batch_size=7, max_new_tokens=5, seed=0)
    for name in ("noise", "other", "order", "image_after"):
        left, right = (next(s.run(c) for c in conditions(s) if c.name == name) for s in (study, other))
        assert left.nats == pytest.approx(right.nats, abs=1e-4), name


def test_samples_without_thoughts_or_pictures_that_break_are_named(maze: Maze, loaded: Loaded) -> None:
    good = open_dataset(maze.shards).read(0)
    source = ListSource([replace(good, key="flat", steps=()), replace(good, key="bad", images=(b"x",)), good])
    study = Study(loaded, source, limit=None, batch_size=2, max_new_tokens=2, seed=0)
    assert (study.indices, len(study.unreadable)) == ([2], 1)
    assert "bad" in study.unreadable[0]
    assert "other" not in {c.name for c in conditions(study)}  # nobody is there to take thoughts from
    with pytest.raises(DataError, match="nothing to probe"):
        Study(loaded, ListSource(source.samples[:1]), limit=None, batch_size=2, max_new_tokens=2, seed=0)


def test_replacements_go_by_the_number_of_the_thought_in_its_row() -> None:
    ids = torch.tensor([[0, 0, 1, LATENT, 2], [1, LATENT, LATENT, LATENT, 2]])
    number = thought_numbers(ids, LATENT)
    assert number.tolist() == [[-1, -1, 0], [0, 1, 2]]
    given = torch.arange(2 * 3 * 2.0).reshape(2, 3, 2)
    transform = given_thoughts(given, number)
    assert torch.equal(transform(torch.zeros(2, 1, 2), 2)[:, 0], torch.stack([given[0, 0], given[1, 2]]))
    some = only_thoughts(transform, [0], number)
    assert torch.equal(some(torch.zeros(2, 1, 2), 2)[:, 0], torch.stack([given[0, 0], torch.zeros(2)]))


def test_donors_are_others_of_the_same_group() -> None:
    groups = [0, 1, 0, 2, 1, 0]
    donors = donors_within(groups, 3)
    assert donors[3] is None
    pairs = [(i, d) for i, d in enumerate(donors) if d is not None]
    assert all(groups[i] == groups[d] and i != d for i, d in pairs)
    assert sorted(d for _, d in pairs) == [0, 1, 2, 4, 5]
    assert all(i != j for i, j in enumerate(other_order(4, 0, "k")))


def test_a_maze_is_read_back_from_its_picture() -> None:
    for puzzle, sample in _puzzles(5):
        assert probe_maze.read_maze(sample) == puzzle
    assert probe_maze.read_maze(replace(sample, answer="none of them")) is None
    assert probe_maze.read_maze(Sample("k", "what is this ?", (), "a")) is None
    assert probe_maze.read_maze(replace(sample, images=(_grey(),))) is None


def test_what_another_puzzles_thought_implies() -> None:
    # Every arrow points right, so from a1 three hops lead to d1 and a fourth out of the picture.
    maze = Puzzle((1,) * 16, tuple(range(8)) * 2, path=(0, 1, 2, 3, 3))
    other = Puzzle((1,) * 16, (0,) * 16, path=(4, 5, 6, 7, 8))
    assert probe_maze.walk(maze, 0, 3) == 3
    assert probe_maze.walk(maze, 0, 4) is None
    assert probe_maze._implied(maze, other, 4) == COLOUR_NAMES[maze.colours[8]]
    assert probe_maze._implied(maze, other, 3) is None  # from d2 the next hop leaves the picture


def test_a_picture_changed_late_is_judged_at_the_cell_thought_of() -> None:
    plain = Puzzle((1,) * 16, (0,) * 16, path=(0, 1, 2, 3, 7))
    other = Puzzle((1,) * 16, (0,) * 7 + (2,) + (0,) * 8, path=(0, 1, 2, 3, 7))
    found = probe_maze.late_picture([plain, other, plain], [1, None, 0], [COLOUR_NAMES[2], None, "x"])
    assert found is not None
    assert (found["share"], found["n"]) == (1.0, 1)  # the third pair shows the same colour: it tells nothing


def test_a_linear_probe_reads_what_is_there_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (400,), generator=generator)
    inputs = torch.nn.functional.one_hot(labels, 8).float() + 0.1 * torch.randn(400, 8, generator=generator)
    words = ["abcd"[i] for i in labels]
    assert probe_words._read_off(inputs, words, 200) > 0.98
    assert probe_words._read_off(torch.randn(400, 8, generator=generator), words, 200) < 0.4
    assert probe_words._commonest(["a", "a", "b", "a", "b", "b"], ["p", "p", "q", "p", "q", "q"], 3) == 1.0
    assert probe_words._commonest(["a", "a", "b", "a", "b", "b"], [""] * 6, 3) == pytest.approx(1 / 3)


def test_looking_gives_a_share_to_every_cell(study: Study) -> None:
    found = looks(study, 0)
    assert [look.label for look in found] == ["thought 1", "thought 2", "thought 3", "thought 4", "answer"]
    assert all(look.weights_yx.shape == (4, 4) for look in found)
    assert all(look.weights_yx.sum() == pytest.approx(1.0) for look in found)
    assert study.model.backbone.text_config._attn_implementation != "eager"
    assert paint(Renderer(28).image(_puzzles(1)[0][0]), found[0].weights_yx, 56).startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_script_writes_a_page_that_escapes_its_data(maze: Maze, tmp_path: Path) -> None:
    from PIL import Image

    source = open_dataset(maze.shards)
    Image.open(__import__("io").BytesIO(source.read(0).images[0])).save(tmp_path / "a.png")
    evil = "<script>alert(1)</script>"
    records = [
        {"id": f"<b>{i}", "question": f"start {evil}", "steps": [f"red {evil}"] * 4, "answer": evil, "image": "a.png"}
        for i in range(4)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ["--checkpoint", str(maze.checkpoints[4]), "--data", str(tmp_path / "data.json"), "--max-new-tokens", "3"]
    assert script.main([*words, "--out", str(tmp_path / "out"), "--num-threads", "1"]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in page.replace("http-equiv", "")  # holds all it shows
    numbers = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert numbers["n"] == 4
    assert "swap" not in numbers


@pytest.mark.parametrize(
    ("highs", "first"),
    [
        ({"noise": -0.3, "mean": -0.3, "other": -0.3}, "The thoughts are used."),
        ({"noise": -0.3, "mean": -0.3, "other": 0.01}, "The thoughts are used."),
        ({"noise": -0.3, "mean": 0.01, "other": 0.02}, "Thoughts are needed, but no use of what they say"),
        ({"noise": -0.3}, "The thoughts are used."),
        ({"noise": 0.02, "mean": 0.01, "other": 0.02}, "No use of the thoughts can be seen"),
    ],
)
def test_thoughts_that_those_of_any_question_can_replace_say_nothing(highs: dict[str, float], first: str) -> None:
    def row(name: str, high: float) -> dict[str, object]:
        change = {"mean": high - 0.02, "low": high - 0.04, "high": high}
        return {
            "name": name, "label": f"({name})", "accuracy": {"mean": 0.9 + change["mean"]},
            "change": change, "nats_change": change,
        }  # fmt: skip

    rows = [row("own", 0.02), *(row(name, high) for name, high in highs.items())]
    sentences = verdict({"causal": rows})
    assert sentences[0].startswith(first)
    strangers = "(mean) 89.0\u202f% and (other) 90.0\u202f%."
    assert any(s.endswith(strangers) for s in sentences) == first.startswith("Thoughts are needed")


def test_the_maze_is_swapped_between_puzzles(study: Study) -> None:
    mazes = probe_maze.read_mazes(study)
    assert mazes is not None
    rows = probe_maze.swap(study, mazes)
    assert rows[-1]["label"] == "all thoughts"
    assert all(0 < row["n"] <= 24 and 0 <= row["implied"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--checkpoint": "{stage_0}"}, "stage 0, which has no thoughts"),
        ({"--data": "nowhere"}, "data nowhere does not exist"),
        ({"--out": "{file}/out"}, "(Not a directory)"),
        ({"--limit": "0"}, "--limit is 0"),
    ],
)
def test_a_mistake_gives_one_line(
    change: dict[str, str], message: str, maze: Maze, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"--checkpoint": str(maze.checkpoints[4]), "--data": str(maze.shards), "--out": str(tmp_path / "out")}
    (tmp_path / "file").touch()
    words |= {name: value.format(stage_0=maze.checkpoints[0], file=tmp_path / "file") for name, value in change.items()}
    assert script.main([word for pair in words.items() for word in pair]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def _puzzles(n: int) -> list[tuple[Puzzle, Sample]]:
    puzzles = draw_puzzles({"test": n}, seed=3)["test"]
    return list(zip(puzzles, to_samples(puzzles, "test", Renderer(28)), strict=True))


def _grey() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (112, 112), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()
