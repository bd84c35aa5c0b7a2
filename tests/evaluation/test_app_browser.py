"""The demo in a real chromium, at two widths: a picture goes up, the slider moves, answer and thoughts come back."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coconut.data import open_dataset
from coconut.evaluation.ask import Settings, ask, question
from coconut.evaluation.loaded import load

from .conftest import Maze

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[2]
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
PATIENCE_MS = 120_000  # machines that run tests do other things too
START_S = 300


def _need(missing: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{missing}; CI=true admits no skipping")
    pytest.skip(missing)


def _python_with_gradio() -> str:
    if importlib.util.find_spec("gradio") is None:
        _need("needs gradio: bash launch/setup.sh app")
    return sys.executable


@dataclass
class Served:
    """An app that runs."""

    url: str
    log: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def pictures(maze: Maze, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    source = open_dataset(maze.shards)
    for index in range(3):
        image = source.read(index).images[0]
        assert isinstance(image, bytes)
        (folder / f"{index}.png").write_bytes(image)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnope")
    return folder


@pytest.fixture(scope="module")
def app(maze: Maze, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    python = _python_with_gradio()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--checkpoint", str(maze.checkpoints[4]), "--examples", str(maze.shards), "--max-new-tokens", "4"]
    command = [python, str(PROJECT / "launch" / "demo_app.py"), *words, "--port", str(port), "--num-threads", "1"]
    folder = tmp_path_factory.mktemp("app")
    environment = {**os.environ, "TMPDIR": str(folder)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    served, ready = Served(f"http://127.0.0.1:{port}/"), threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            served.log.append(line)
            if line.startswith("ready: "):
                ready.set()
        ready.set()  # it has ended

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(START_S), "".join(served.log)
        assert process.poll() is None, "".join(served.log)
        yield served
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
    assert process.returncode == 0
    assert not list(folder.glob("coconut-app-*")), "uploaded pictures are left behind"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        _need("needs chromium, which is not installed")
    if importlib.util.find_spec("playwright") is None:
        _need("needs playwright, which is not installed")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with (
        sync_playwright() as playwright,
        contextlib.closing(playwright.chromium.launch(executable_path=chromium, args=arguments)) as opened,
    ):
        yield opened


class Visit:
    """A page of the app as a person has it before them."""

    def __init__(self, browser, url: str, width: str) -> None:  # type: ignore[no-untyped-def]
        sizes = WIDTHS[width]
        self.page = browser.new_page(viewport={"width": sizes[0], "height": sizes[1]})
        self.page.set_default_timeout(PATIENCE_MS)
        self.asked_for: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked_for.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url, timeout=PATIENCE_MS)
        self.page.wait_for_selector("#ask textarea")

    def upload(self, path: Path) -> None:
        with self.page.expect_response(lambda response: "upload" in response.url):
            self.page.set_input_files("input[type=file]", str(path))
        self.page.wait_for_selector("[aria-label='Clear'], [aria-label='Remove Image'], [aria-label='Remove']")

    def ask(self, text: str) -> None:
        self.page.fill("#ask textarea", text)
        self.page.get_by_role("button", name="Answer", exact=True).click()

    def said(self) -> str:
        return str(self.page.wait_for_selector(".coco-said[data-done='1']").inner_text())

    def error(self) -> str:
        return str(self.page.wait_for_selector(".coco-error").inner_text())

    def overflow_px(self) -> int:
        root = "document.documentElement"
        return int(self.page.evaluate(f"Math.max({root}.scrollWidth, document.body.scrollWidth) - {root}.clientWidth"))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_question_is_answered(
    app: Served, browser: object, maze: Maze, pictures: Path, width: str, tmp_path: Path
) -> None:
    visit = Visit(browser, app.url, width)
    assert visit.overflow_px() == 0
    visit.upload(pictures / "0.png")
    slider = visit.page.get_by_role("slider")
    assert (slider.get_attribute("min"), slider.get_attribute("max"), slider.input_value()) == ("0", "4", "4")
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    visit.ask("start a1 ?")
    shown = visit.said()
    (reply,) = ask(load(maze.checkpoints[4]), [question("start a1 ?", [str(pictures / "0.png")])], Settings(4, 2))
    assert shown == (reply.answer or reply.text)
    visit.page.wait_for_selector(".coco-view")
    cards = visit.page.query_selector_all(".coco-view")
    last = "answer" if "###" in reply.text else "first word"
    assert [card.query_selector("h3").inner_text() for card in cards] == ["thought 1", "thought 2", last]
    assert [len(card.query_selector_all(".coco-tokens li")) for card in cards] == [5, 5, 0]
    assert all(
        card.query_selector("img").evaluate("image => image.complete && image.naturalWidth > 0") for card in cards
    )
    assert re.search(r"2 thoughts, \d tokens? written: \d forward passes", visit.page.inner_text("#answer"))
    picture = tmp_path / f"{width}.png"
    visit.page.screenshot(path=str(picture), full_page=True)
    assert picture.stat().st_size > 10_000
    assert visit.overflow_px() == 0
    elsewhere = [url for url in visit.asked_for if not url.startswith((app.url, "data:", "blob:"))]
    assert not elsewhere, "the page must work without the internet"
    assert not visit.errors
    visit.page.close()


def test_mistakes_are_told_and_the_app_lives_on(app: Served, browser: object, pictures: Path) -> None:
    visit = Visit(browser, app.url, "desk")
    visit.ask("start a1 ?")
    assert visit.error() == "There is no picture: choose one, or drop one on its field."
    visit.upload(pictures / "broken.png")
    visit.ask("start a1 ?")
    visit.page.wait_for_function("document.querySelector('.coco-error')?.innerText.startsWith('Image is not')")
    visit.page.reload()
    visit.page.wait_for_selector("#ask textarea")
    visit.upload(pictures / "1.png")
    visit.ask("   ")
    assert "question is empty" in visit.error()
    visit.ask("<img src=x onerror=alert(1)> ${1+1} {{7*7}}")
    assert visit.said()
    assert not visit.errors
    assert not [line for line in app.log if "Traceback" in line]
    visit.page.close()


def test_an_example_fills_picture_and_question(app: Served, browser: object, maze: Maze) -> None:
    visit = Visit(browser, app.url, "desk")
    expected = open_dataset(maze.shards).read(1).question
    visit.page.locator("#examples tbody tr").nth(1).click()
    visit.page.wait_for_function("document.querySelector('#ask textarea').value.length > 0")
    assert visit.page.input_value("#ask textarea") == expected
    visit.page.get_by_role("button", name="Answer", exact=True).click()
    assert visit.said()
    visit.page.close()
