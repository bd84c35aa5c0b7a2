"""The demo's answers, without its page: as asking gives them, thoughts as the probe sees them, mistakes in words."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

from coconut.data import open_dataset
from coconut.evaluation import app_answer
from coconut.evaluation.app_answer import Answerer, message_of
from coconut.evaluation.ask import Settings, ask, prompt_features, question
from coconut.evaluation.loaded import Loaded, load
from coconut.evaluation.page import render_part
from coconut.evaluation.probe import Study
from coconut.evaluation.probe_look import looks
from coconut.evaluation.probe_words import lens
from coconut.types import DataError
from launch import demo_app as script

from .conftest import Maze


@pytest.fixture(scope="module")
def loaded(maze: Maze) -> Loaded:
    return load(maze.checkpoints[4])


@pytest.fixture(scope="module")
def answerer(loaded: Loaded) -> Answerer:
    return Answerer(loaded, max_new_tokens=4)


@pytest.fixture(scope="module")
def picture(maze: Maze) -> bytes:
    image = open_dataset(maze.shards).read(0).images[0]
    assert isinstance(image, bytes)
    return image


@pytest.mark.parametrize("n_latents", [0, 2, 4])
def test_words_come_one_by_one_and_end_as_asking_does(answerer: Answerer, picture: bytes, n_latents: int) -> None:
    parts = list(answerer.stream(picture, "start a1 ?", n_latents))
    (reply,) = ask(answerer.loaded, [question("start a1 ?", [picture])], Settings(4, n_latents))
    whole = parts[-1]
    assert (whole.text, whole.answer, whole.n_generated) == (reply.text, reply.answer, reply.n_generated)
    assert whole.passes == n_latents + reply.n_generated
    assert [part.done for part in parts] == [False] * reply.n_generated + [True]
    assert [part.n_generated for part in parts[:-1]] == list(range(1, reply.n_generated + 1))
    assert all(reply.text.startswith(part.text) for part in parts)
    last = "answer" if "###" in reply.text else "first word"
    assert [view.label for view in whole.views] == [*(f"thought {t + 1}" for t in range(n_latents)), last]


def test_thoughts_look_as_the_probe_sees_them(
    maze: Maze, answerer: Answerer, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_dataset(maze.shards)
    study = Study(answerer.loaded, source, limit=1, batch_size=1, max_new_tokens=4, seed=0)
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(
        app_answer, "paint", lambda image, weights_yx, side: drawn.append(torch.from_numpy(weights_yx)) or b"png"
    )
    *_, whole = answerer.stream(picture, source.read(0).question, 4)
    words = [
        tuple((t["token"], pytest.approx(t["share"], abs=1e-4)) for t in row) for row in lens(study, study.thoughts[0])
    ]
    assert [view.tokens for view in whole.views[:4]] == words
    assert whole.views[4].tokens == ()
    *expected, answer = looks(study, 0)
    for view, weights_yx, seen in zip(whole.views, drawn, expected, strict=False):
        assert torch.allclose(weights_yx, torch.from_numpy(seen.weights_yx), atol=1e-5)
        assert view.share == pytest.approx(seen.share, abs=1e-5)
    # The probe's answer follows the true text; where the model writes that, the picture is the same.
    text = study.features[0]["text"].answer
    features = prompt_features(answerer.loaded, source.read(0), 4)
    views, _ = answerer._look_inside(features, 4, picture, list(text))
    assert views[4].label == "answer"
    assert torch.allclose(drawn[-1], torch.from_numpy(answer.weights_yx), atol=1e-5)
    assert views[4].share == pytest.approx(answer.share, abs=1e-5)


def test_attention_that_would_not_fit_is_not_drawn(
    answerer: Answerer, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_answer, "MAX_ATTENTION_BYTES", 100)
    *_, whole = answerer.stream(picture, "start a1 ?", 2)
    assert "too many weights" in whole.note
    assert [view.picture for view in whole.views] == [None, None]
    assert all(len(view.tokens) == 5 for view in whole.views)


def test_a_reader_who_leaves_does_not_hold_up_the_next(answerer: Answerer, picture: bytes) -> None:
    slow = Answerer(answerer.loaded, max_new_tokens=200)  # random weights: it may never end by itself
    stream = slow.stream(picture, "start a1 ?", 1)
    next(stream)
    stream.close()
    slow.max_new_tokens = 3
    *_, whole = slow.stream(picture, "start a1 ?", 1)
    assert whole.done


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (12_000, 9_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "text", "n_latents", "message"),
    [
        (None, "start a1 ?", 4, "There is no picture"),
        (b"\x89PNG\r\n\x1a\nnope", "start a1 ?", 4, "Image is not an image that can be read"),
        (b"", "start a1 ?", 4, "Image is empty"),
        (b"0" * 20_000_001, "start a1 ?", 4, "The picture has 20.0 MB"),
        (_bomb(), "start a1 ?", 4, "12000 x 9000 pixels, more than 89478485; make it smaller"),
        ("picture", " \n", 4, "The question is empty"),
        ("picture", "a" * 4_001, 4, "4,001 characters"),
        ("picture", "start a1 ?", 5, "takes 0 to 4"),
        ("picture", "start a1 ?", -1, "takes 0 to 4"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    content: bytes | str | None, text: str, n_latents: int, message: str, answerer: Answerer, picture: bytes
) -> None:
    given = picture if content == "picture" else content
    assert not isinstance(given, str)
    with pytest.raises(DataError) as caught:
        list(answerer.stream(given, text, n_latents))
    assert message in message_of(caught.value)
    assert "\n" not in message_of(caught.value)


def test_a_fault_of_ours_is_logged_and_shows_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    assert (
        message_of(KeyError("/home/me")) == "The model failed (KeyError); the log where the app was started says more."
    )
    assert "/home/me" in caplog.text
    assert "Memory is short" in message_of(torch.OutOfMemoryError("CUDA out of memory"))


def test_text_of_a_model_is_escaped(answerer: Answerer, picture: bytes) -> None:
    evil = "<script>alert(1)</script>"
    *_, whole = answerer.stream(picture, "start a1 ?", 1)
    said = render_part("app_answer", answered=type(whole)(**{**whole.__dict__, "text": evil, "answer": evil}))
    view = {"label": evil, "tokens": [{"token": evil, "share": "1%", "v": 0.01}], "image": None, "share": None}
    shown = render_part("app_thoughts", views=[view], note=evil)
    for page in (said, shown, render_part("app_answer", error=evil)):
        assert "<script" not in page
        assert "&lt;script&gt;" in page


def test_a_checkpoint_without_thoughts_offers_none(maze: Maze, picture: bytes) -> None:
    plain = Answerer(load(maze.checkpoints[0]), max_new_tokens=3)
    assert plain.max_latents == 0
    *_, whole = plain.stream(picture, "start a1 ?", 0)
    assert [view.label for view in whole.views] in (["answer"], ["first word"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "0"], "--port is 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--examples", "nowhere.json"], "--examples nowhere.json does not exist"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 7860 cannot be listened on"),
    ],
)
def test_the_script_refuses_before_it_loads(
    words: list[str], message: str, maze: Maze, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--checkpoint", str(maze.checkpoints[4]), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_port_in_use_is_named(maze: Maze, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert script.main(["--checkpoint", str(maze.checkpoints[4]), "--port", str(port)]) == 2
    assert f"--port {port} cannot be listened on" in capsys.readouterr().err


def test_it_listens_on_this_machine_alone_unless_told_otherwise(tmp_path: Path) -> None:
    assert script.build_parser().parse_args(["--checkpoint", str(tmp_path)]).host == "127.0.0.1"
