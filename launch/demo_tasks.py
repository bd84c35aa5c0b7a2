"""What `launch/demo.py` can train on, and the methods that it compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

Words = tuple[object, ...]  # of a command

DEEP_NO_COT = "no_cot_deep"
#: Methods of docs/methods.md beside Coconut, CoT and no-CoT.
OTHER_METHODS = (
    DEEP_NO_COT,
    "icot",
    "pause",
    "pause_as_thought",
    "pause_multipass",
    "no_curriculum",
    "no_thought",
)
SINGLE_STAGE = (DEEP_NO_COT, "pause", "no_curriculum")


class Task(ABC):
    """Data, a tiny model for it and a configuration.

    Attributes:
        name: of the default folder.
        config: file of args/.
        data: folder of the data, as `config` names it.
        tests: data sets to evaluate on; the controls are tried on the first.
        pretraining: file of args/ for a run before all others, whose end they start from; None: from random weights.
        layers: of the decoder.
        thoughts: of the last stage.
        step_tokens: of a written step; icot takes as many away a stage.
        max_new_tokens: more than the longest text written out.
    """

    name: str
    config: str
    data: Path
    tests: tuple[Path, ...]
    pretraining: str | None = None
    layers: int
    thoughts: int
    step_tokens: int
    max_new_tokens: int

    @property
    def deep_layers(self) -> int:
        """As many layers one after the other as Coconut's passes have: that of the prompt and one a thought."""
        return (1 + self.thoughts) * self.layers

    @abstractmethod
    def data_commands(self, root: Path) -> Iterator[Words]:
        """Commands that make what is missing of the data below `root`."""

    @abstractmethod
    def model_command(self, folder: Path, layers: int, seed: int) -> Words:
        """A command that builds the model that runs start from, unless it is there."""


class ArrowMaze(Task):
    """Follow the arrows of a picture (`coconut/data/arrow_maze.py`)."""

    name = "demo"
    config = "args/demo.yaml"
    data = Path("data/arrow_maze")
    tests = (data / "shards/test", data / "shards/test_paths")
    layers = 3
    thoughts = 4
    step_tokens = 4
    max_new_tokens = 32

    def data_commands(self, root: Path) -> Iterator[Words]:
        yield from ()  # the model's command makes the data too

    def model_command(self, folder: Path, layers: int, seed: int) -> Words:
        model = ("--model-seed", seed, "--model-layers", layers, "--model-out", folder)
        return ("launch/prepare_data.py", "arrow-maze", "--out", self.data, *model)


class ProsQA(Task):
    """Which of two kinds is it? Graphs told in words, smaller than the paper's (`coconut/data/prosqa.py`)."""

    name = "prosqa"
    config = "args/prosqa_small.yaml"
    data = Path("data/prosqa_small")
    tests = (data / "test.json",)
    pretraining = "args/prosqa_recite.yaml"
    layers = 3
    thoughts = 6
    step_tokens = 4
    max_new_tokens = 64
    drawn = ("--generate", "--terse", "--nodes", 12, "--names", 12)
    #: Folder, further options, and how many of each split.
    sets = (
        (data, ("--even",), {"train": 20_000, "val": 500, "test": 1000}),
        (data / "recite", ("--recite",), {"train": 10_000, "val": 100}),
    )

    def data_commands(self, root: Path) -> Iterator[Words]:
        for folder, options, sizes in self.sets:
            for split, size in sizes.items():
                if not (root / folder / f"{split}.json").exists():
                    what = (*self.drawn, *options, "--size", size, "--split", split)
                    yield ("launch/prepare_data.py", "prosqa", *what, "--out", folder)

    def model_command(self, folder: Path, layers: int, seed: int) -> Words:
        model = ("--layers", layers, "--seed", seed, "--model-out", folder)
        return ("launch/prepare_data.py", "decoder", "--text", self.data / "train.json", *model)


TASKS: dict[str, Task] = {"arrow-maze": ArrowMaze(), "prosqa": ProsQA()}
