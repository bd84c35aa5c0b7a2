"""A tiny maze model, its data as shards, and hand-written results, for the tests of evaluation and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coconut.evaluation.result import EvaluationOptions, EvaluationResult, Prediction
from coconut.types import Sample, StageSpec

COT = StageSpec(stage=0, n_skip_steps=0, n_latents=0, c_thought=1)
COCONUT = StageSpec(stage=4, n_skip_steps=4, n_latents=4, c_thought=1)
NO_COT = StageSpec(stage=0, n_skip_steps=None, n_latents=0, c_thought=1, markers=False)


@dataclass
class ListSource:
    """Samples in a list, as evaluation reads them."""

    samples: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Sample:
        return self.samples[index]


@dataclass
class Maze:
    """Where the session's small data set and checkpoints lie."""

    shards: Path
    checkpoints: dict[int, Path]  # by stage


@pytest.fixture(scope="session")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Maze:
    """24 test puzzles as shards with a facts file, and random models saved as checkpoints of stage 0 and 4."""
    import torch

    from coconut.data import ImageProcessor, write_shards
    from coconut.data.arrow_maze import CELL_PX, Renderer, draw_puzzles, to_samples, vocabulary
    from coconut.data.stage_text import build_prompt_template, stage_spec
    from coconut.model import MultimodalCoconut
    from coconut.model.tiny import build_tiny_internvl, build_word_tokenizer

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("maze")
    puzzles = draw_puzzles({"test": 24}, seed=0)["test"]
    write_shards(to_samples(puzzles, "test", Renderer(CELL_PX)), folder / "shards" / "test")
    (folder / "facts.json").write_text(json.dumps({"floors": {"uniform chance": 0.125, "start cell": 0.34}}))
    tokenizer = build_word_tokenizer(vocabulary())
    # Large random weights: with the usual ones an untrained model repeats its last token, whatever it is shown.
    base = build_tiny_internvl(tokenizer, initializer_range=0.3)
    model = MultimodalCoconut(base, *_latent_ids(tokenizer), tokenizer.eos_token_id)
    model.prompt_template = build_prompt_template(tokenizer, "plain")
    processor = ImageProcessor(112, max_num_patches=1, use_thumbnail=False, dynamic_preprocess=False)
    checkpoints = {}
    for stage in (0, 4):
        checkpoints[stage] = folder / "run" / f"stage_{stage}"
        model.stage_spec = stage_spec(stage, c_thought=1)
        model.metadata = {"config": {"seed": 3}, "state": {"samples": 640, "step": 20, "flops": 1.5e9, "seconds": 7.0}}
        model.save_pretrained(checkpoints[stage])
        tokenizer.save_pretrained(checkpoints[stage])
        processor.save_pretrained(checkpoints[stage])
    return Maze(folder / "shards" / "test", checkpoints)


def _latent_ids(tokenizer: Any) -> tuple[int, int, int]:
    """Ids in the order of `MultimodalCoconut`'s arguments: latent, start, end."""
    from coconut.utils.tokenizer import special_token_ids

    start, latent, end = special_token_ids(tokenizer)
    return latent, start, end


@pytest.fixture
def write_evaluation(maze: Maze) -> Callable[..., Path]:
    """Writes an evaluation folder by hand: which of ten puzzles are right, of what model, asked how."""

    def write(
        folder: Path,
        spec: StageSpec,
        right: Sequence[bool],
        *,
        checkpoint: str = "run/final",
        data: Path | None = None,
        seed: int = 0,
        says: str = "### {answer}",
        **options: Any,
    ) -> Path:
        tokens = {0: 19 if spec.n_skip_steps == 0 else 3, 4: 3}[spec.n_latents]
        predictions = tuple(
            Prediction(
                index=index,
                key=f"test-{index:06d}",
                question=f"start a{index % 4 + 1} ?",
                prediction=says.format(answer="red" if is_right else "blue"),
                target="### red",
                answer="red",
                predicted_answer="red" if is_right else "blue",
                correct=is_right,
                score=float(is_right),
                full_match=is_right,
                n_generated=tokens,
                n_latents=spec.n_latents,
                passes=tokens + spec.n_latents,
                n_prompt_tokens=28,
                n_patches=1,
            )
            for index, is_right in enumerate(right)
        )
        result = EvaluationResult(predictions, spec, EvaluationOptions(**options), seconds=0.01 * len(predictions))
        state = {"samples": 19880, "step": 625, "flops": 5.2e13, "seconds": 60.0}
        extra = {
            "checkpoint": checkpoint,
            "data": str(data or maze.shards),
            "metadata": {"config": {"seed": seed}, "state": state},
            "machine": {"ranks": 1, "device": "CPU", "threads_per_rank": 1, "dtype": "float32"},
        }
        result.save(folder, extra)
        return folder

    return write


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """Writes a run folder by hand: a metrics file of two stages and a configuration."""

    def write(folder: Path, method: str = "coconut", config: str | None = None) -> Path:
        folder.mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        for stage, first in ((0, 0), (1, 60)):
            for step in range(first + 10, first + 61, 10):
                rows.append(
                    {"kind": "train", "stage": stage, "step": step, "loss": 2.0 / (step - first), "samples": 32 * step}
                )
            rows.append(
                {"kind": "val", "stage": stage, "step": first + 60, "loss": 0.2, "accuracy": 0.9, "full_match": 0.8}
            )
            rows.append({"kind": "stage", "stage": stage, "step": first + 60, "flops": 1e12, "seconds": 61.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.yaml").write_text(config or f"method: {method}\nlearning_rate: 0.001\n")
        return folder

    return write
