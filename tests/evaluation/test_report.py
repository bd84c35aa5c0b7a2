"""The page: complete in itself, true to the numbers, safe against text that would be markup."""

from __future__ import annotations

import io
import json
import re
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from coconut.evaluation import figures
from coconut.evaluation.wording import count, duration, percent
from launch import report as script

from .conftest import COCONUT, COT, NO_COT

Write = Callable[..., Path]


class Page(HTMLParser):
    """What a browser would load and show of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        self.open.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += f" {data}"

    @property
    def words(self) -> str:
        return " ".join(self.text.replace("\u202f", " ").split())


@pytest.fixture(autouse=True)
def _one_screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures for one kind of screen take a quarter of the time; one test draws all."""
    if request.node.name != "test_the_demo_command_makes_a_page_that_holds_all_it_shows":
        monkeypatch.setattr(figures, "SCREENS", {figures.LIGHT_WIDE: ""})


@pytest.fixture
def demo(tmp_path: Path, write_evaluation: Write, write_run: Write) -> Path:
    """What the demo leaves: two runs, evaluations of three methods, wall times."""
    for name, spec, n_right in (("cot", COT, 10), ("coconut", COCONUT, 9), ("no_cot", NO_COT, 2)):
        checkpoint = {"cot": "coconut/stage_0"}.get(name, f"{name}/final")
        right = [i < n_right for i in range(10)]
        write_evaluation(tmp_path / "eval" / name, spec, right, checkpoint=checkpoint)
        shuffled = [i < 1 for i in range(10)]
        write_evaluation(
            tmp_path / "eval" / f"{name}_shuffled", spec, shuffled, checkpoint=checkpoint, shuffle_images=True
        )
    write_run(tmp_path / "coconut")
    write_run(tmp_path / "no_cot", "no_cot")
    (tmp_path / "demo_times.json").write_text(json.dumps({"data": 21.0, "training": 400.0}))
    return tmp_path


@pytest.mark.slow
def test_the_demo_command_makes_a_page_that_holds_all_it_shows(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = demo / "report"
    words = ["--out", str(out), "--run", f"Coconut={demo / 'coconut'}", f"no-CoT={demo / 'no_cot'}"]
    assert script.main([*words, "--eval", str(demo / "eval")]) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    page = Page(out / "index.html")
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    for expected in (
        "Coconut answers 90.0 % of 10 questions, in 7 sequential forward passes each; CoT 100.0 %, in 19.",
        "images shuffled 10.0 %",
        "90.0 % 59.6 – 98.2",  # Wilson's interval of 9 in 10
        "19,880",
        "5.2 × 10¹³",
        "uniform chance 12.5 %",
        "look-up from start cell 34.0 %",
        "Coconut is right (9 of 10)",
        "Coconut is wrong (1 of 10)",
        "✗ wrong",
        "7 min 01 s in all",
        "learning_rate: 0.001",
    ):
        assert expected in page.words, expected
    assert "Seeds" not in page.words
    for name in ("methods", "changes", "training", "training_no_cot"):
        with Image.open(out / f"{name}.png") as image:
            assert image.size[0] > 1200, name
    # The examples show the puzzles' own pictures.
    assert page.tags.count("img") >= 4 + 4
    assert page.tags.count("source") == 4 * 3  # each figure for phones, and for the night


def test_one_run_folder_is_enough(tmp_path: Path, write_run: Write, write_evaluation: Write) -> None:
    run = write_run(tmp_path / "run")
    assert script.main([str(run)]) == 0
    page = Page(run / "report" / "index.html")
    assert "Training" in page.words
    assert "Methods" not in page.words
    write_evaluation(run / "eval" / "test", COCONUT, [True, False])
    assert script.main([str(run)]) == 0
    assert "50.0 %" in Page(run / "report" / "index.html").words


def test_several_seeds_show_mean_spread_and_each_run(tmp_path: Path, write_evaluation: Write, write_run: Write) -> None:
    for seed, n_right in enumerate((10, 9, 8)):
        folder = tmp_path / f"seed_{seed}"
        right = [i < n_right for i in range(10)]
        write_evaluation(folder / "eval", COCONUT, right, checkpoint=f"{folder}/final", seed=seed)
        write_run(folder / "coconut")
    assert script.main([str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    words = Page(tmp_path / "page" / "index.html").words
    for expected in ("90.0 % ± 10.0 80.0 – 100.0, 3 runs", "(mean of 3 runs)", "seed 1 90.0 %", "Coconut. 3 runs."):
        assert expected in words, expected


def test_text_from_data_stays_text(tmp_path: Path, write_evaluation: Write, write_run: Write) -> None:
    attack = '<script>alert(1)</script><img src="http://evil/x.png"> {{ 7 * 7 }} &amp;'
    run = write_run(tmp_path / attack.replace("/", "_")[:20], config=f"method: coconut\nname: '{attack}'\n")
    evaluation = write_evaluation(
        tmp_path / "e", COCONUT, [True, False], says=attack.replace("{", "{{").replace("}", "}}")
    )
    words = [
        "--out",
        str(tmp_path / "out"),
        "--title",
        attack,
        "--run",
        str(run),
        "--eval",
        f"<b>bold</b>={evaluation}",
    ]
    assert script.main([*words, "--floor", f"{attack}=0.5"]) == 0
    page = Page(tmp_path / "out" / "index.html")
    assert not {"script", "b>bold"} & set(page.tags)
    assert all(source.startswith("data:") for source in page.sources)
    assert attack in page.words  # shown to the letter, neither run nor evaluated by the template
    assert "<b>bold</b>" in page.words


def test_the_page_asks_nothing_of_a_network(demo: Path) -> None:
    script.main([str(demo)])
    text = (demo / "report" / "index.html").read_text(encoding="utf-8")
    without_data = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.findall(r"https?://|@import|url\(|<script", without_data)
    assert len(without_data) < 40_000


def test_data_that_is_gone_leaves_the_texts(tmp_path: Path, write_evaluation: Write) -> None:
    write_evaluation(tmp_path / "e", COCONUT, [True, False], data=tmp_path / "gone" / "test")
    assert script.main([str(tmp_path)]) == 0
    page = Page(tmp_path / "report" / "index.html")
    assert "### red" in page.words
    assert page.tags.count("img") == 1  # the figure of methods


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a FOLDER"),
        (["nowhere"], "nowhere is no folder"),
        (["--out", "x", "--eval", "nowhere"], "no evaluation folder"),
        (["--out", "x", "--run", "A=nowhere"], "no run folder"),
        (["--out", "x"], "nothing to report"),
        (["--out", "x", "--floor", "chance"], "--floor chance"),
        (["--out", "x", "--floor", "chance=12.5"], "--floor chance=12.5"),
    ],
)
def test_a_mistake_gives_one_line_and_code_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_figure_is_the_same_for_the_same_numbers() -> None:
    bars = [figures.Bar("A", 0.9, 0.8, 0.95, 0, 4, 3), figures.Bar("B", 0.0, 0.0, 0.1, 1, 0, 19)]
    first = figures.draw_methods(bars, {"chance": 0.125}, "95 % interval", figures.LIGHT_WIDE)
    assert first == figures.draw_methods(bars, {"chance": 0.125}, "95 % interval", figures.LIGHT_WIDE)
    dark = figures.draw_methods(bars, {}, "95 % interval", figures.Style(dark=True, narrow=True))
    with Image.open(io.BytesIO(first)) as light, Image.open(io.BytesIO(dark)) as night:
        assert light.convert("L").getpixel((0, 0)) > 240
        assert night.convert("L").getpixel((0, 0)) < 40
        assert night.width < light.width / 2


def test_curves_of_a_run_without_looks_can_be_drawn() -> None:
    curve = figures.Curve([10], [0.5], [], [], [], [(0, 0, 10)])
    assert figures.draw_training([curve], 0, figures.LIGHT_WIDE).startswith(b"\x89PNG")
    empty = figures.Curve([], [], [], [], [], [])
    assert figures.draw_training([empty, curve], 0, figures.LIGHT_WIDE).startswith(b"\x89PNG")


def test_numbers_as_a_person_reads_them() -> None:
    assert percent(0.98765) == "98.8\u202f%"
    assert [count(v) for v in (None, 3, 19880, 2.5, 5.23e13)] == ["–", "3", "19,880", "2.5", "5.2 × 10¹³"]
    assert [duration(s) for s in (0.04, 12.3, 61, 3723)] == ["0.0 s", "12 s", "1 min 01 s", "1 h 02 min"]


def test_the_templates_travel_with_the_package(project: Path) -> None:
    patterns = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["coconut"]
    for path in (project / "coconut" / "evaluation" / "templates").iterdir():
        name = path.relative_to(project / "coconut").as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), f"{name} is in no package-data of pyproject.toml"
