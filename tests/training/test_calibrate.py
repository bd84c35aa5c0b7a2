"""The cost model fits what it is measured on, and the plan uses it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coconut.config import load_config
from coconut.training.calibrate import Measured, fit_costs
from coconut.training.preview import open_preview
from coconut.types import DataError
from launch.calibrate import main


def made_up(n: int, seed: int = 0, noise: float = 0.02) -> list[Measured]:
    """Times of 2 us a token, 50 us a patch, 20 us a row's latent pass, 1 ms a pass and 5 ms a micro-batch."""
    draw = random.Random(seed)
    found = []
    for _ in range(n):
        rows, columns, passes = draw.randint(1, 8), draw.randint(20, 500), draw.choice([0, 2, 4])
        patches = draw.randint(0, 13 * rows) if draw.random() < 0.7 else 0
        seconds = 5e-3 + 2e-6 * rows * columns + 50e-6 * patches + 20e-6 * rows * passes + 1e-3 * passes
        measured = Measured(rows * columns, patches, rows * passes, passes, seconds * draw.gauss(1, noise))
        found.append(measured)
    return found


def test_factors_are_found_again() -> None:
    fit = fit_costs(made_up(200))
    assert fit.seconds_per_token == pytest.approx(2e-6, rel=0.15)
    assert fit.cost_per_patch == pytest.approx(25, rel=0.15)
    assert fit.cost_per_latent_pass == pytest.approx(10, rel=0.6)
    assert fit.error < 0.03 < 3 * fit.error < fit.error_of_tokens


def test_what_costs_nothing_is_zero_and_never_less() -> None:
    text_only = [Measured(one.tokens, 0, 0, 0, 1e-6 * one.tokens) for one in made_up(60)]
    fit = fit_costs(text_only)
    assert (fit.cost_per_patch, fit.cost_per_latent_pass) == (0, 0)
    assert fit.error == pytest.approx(0, abs=1e-6)
    draw = random.Random(1)
    for seed in range(20):  # patches that cost nothing, times that are mere noise around tokens
        noisy = [
            Measured(m.tokens, m.patches, 0, 0, 1e-6 * m.tokens * draw.uniform(0.5, 1.5)) for m in made_up(40, seed)
        ]
        assert fit_costs(noisy).cost_per_patch >= 0


def test_times_that_do_not_hang_on_tokens_are_an_error() -> None:
    with pytest.raises(DataError, match="too alike, or the machine is too busy"):
        fit_costs([Measured(100 * n, 0, 0, 0, 1 / n) for n in range(1, 30)])


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and records with pictures of 1 to 13 tiles and texts of very different length."""
    from coconut.data.arrow_maze import vocabulary
    from coconut.model.tiny import build_tiny_internvl, build_word_tokenizer, save_tiny

    folder = tmp_path_factory.mktemp("calibrate")
    tokenizer = build_word_tokenizer(vocabulary())
    save_tiny(build_tiny_internvl(tokenizer, image_size=112), tokenizer, folder / "model")
    records, draw = [], random.Random(0)
    for i in range(60):
        steps = ["blue up a3"] * draw.randint(1, 4)
        record = {
            "id": f"k{i}",
            "question": "start a4 ?" + " up" * draw.randint(0, 200),
            "steps": steps,
            "answer": "red",
        }
        if i % 4:
            size = (112 * draw.randint(1, 4), 112 * draw.randint(1, 3))
            Image.new("RGB", size, (4 * i, 0, 99)).save(folder / f"{i}.png")
            record["image"] = f"{i}.png"
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    path = folder / "run.yaml"
    path.write_text(
        f"model_id: {folder / 'model'}\ntrain_data_path: {folder / 'data.json'}\nsave_path: {folder / 'runs'}\n"
        "image_size: 112\nmax_num_patches: 12\nprompt_format: plain\nc_thought: 1\nmax_latent_stage: 4\n"
        "batch_size_training: 4\nnum_threads: 1\nuniform_prob: 0\nbalance: cost\n"
    )
    return path


@pytest.mark.slow
def test_the_script_prints_keys_that_the_plan_follows(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(config_file), "--seconds", "4"]) == 0
    said = capsys.readouterr().out
    print(said)
    together = config_file.with_name("calibrated.yaml")
    together.write_text(config_file.read_text() + said)
    config = load_config(together)
    assert config.cost_per_patch > 1, "a tile of 64 patches through the vision tower costs more than a token of text"
    opened = open_preview(config)
    plain = open_preview(load_config(config_file))
    patches = opened.inputs.patches
    assert set(patches) >= {0, 1, 13} and plain.train.tokens_N.tolist() == plain.inputs.costs(3).tolist()
    for stage, passes in ((0, 0), (3, 3), (5, 4)):
        added = opened.inputs.costs(stage) - opened.train.tokens_N
        assert added == pytest.approx(config.cost_per_patch * patches + config.cost_per_latent_pass * passes)
    plans = [one.inputs.train_loader(3, 0, 0, one.geometry(2), 2).plan for one in (opened, plain)]
    assert plans[0].costs.tolist() == opened.inputs.costs(3).tolist()
    dealt = [[slot.tolist() for step in range(len(plan)) for slot in plan.step(step)] for plan in plans]
    assert dealt[0] != dealt[1]


def test_bad_arguments(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--seconds", "0"], "--seconds is 0; it must be more than 0"),
        (["cost_per_patch=-1"], "cost_per_patch = -1: must be at least 0"),
        (["train_data_path=nowhere.json"], "does not exist"),
    ):
        assert main(["--config", str(config_file), *arguments]) == 2
        assert said in capsys.readouterr().err
    assert np.isfinite(load_config(config_file).cost_per_patch)
