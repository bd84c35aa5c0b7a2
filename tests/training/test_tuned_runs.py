"""Runs that train a part of their model: equal losses on any layout, resumed exactly, handed on as ordinary models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coconut.evaluation.loaded import load
from coconut.model import MultimodalCoconut
from launch import export
from tests.training.ranks import Run, run, start

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TUNED = ("freeze=[vision]", "lora_rank=4", "gradient_checkpointing=true", "learning_rate=0.01", "start_stage=1")
HEAD = "lm_head.weight"


def losses(run_: Run) -> list[float]:
    return [row["loss"] for row in run_.rows()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return MultimodalCoconut.from_pretrained(folder).base_model.state_dict()


@pytest.fixture(scope="module")
def unbroken(home: Path) -> Run:
    """Frozen vision tower, LoRA, ZeRO-3, checkpointing, two ranks."""
    return run(home, "tuned", *TUNED, "stop_after_stage=1", zero="zero3")


def test_it_goes_on_exactly(home: Path, unbroken: Run) -> None:
    run(home, "tuned-again", *TUNED, "max_steps=2", zero="zero3")
    again = run(home, "tuned-again", *TUNED, "stop_after_stage=1", zero="zero3")
    assert losses(again) == losses(unbroken) and losses(again)[-1] < losses(again)[0]
    mine, theirs = (weights(found.folder / "stage_1") for found in (again, unbroken))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_one_process_gives_the_same_losses_and_other_layouts_go_on(home: Path, unbroken: Run) -> None:
    run(home, "tuned-one", *TUNED, "gradient_checkpointing=false", "max_steps=2", ranks=1, zero="zero2")
    one = run(home, "tuned-one", *TUNED, "gradient_checkpointing=false", "stop_after_stage=1", ranks=1, zero="zero3")
    assert losses(one) == pytest.approx(losses(unbroken), abs=1e-4)
    print("TUNED largest difference", max(abs(a - b) for a, b in zip(losses(one), losses(unbroken), strict=True)))


def test_only_what_was_asked_for_has_changed(home: Path, unbroken: Run) -> None:
    before, after = weights(home / "data" / "arrow_maze" / "model"), weights(unbroken.folder / "stage_1")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("language_model.layers" in n or "projector" in n or "embed_tokens" in n for n in changed - {HEAD})
    assert not any("norm" in name or "bias" in name for name in changed if "language_model.layers" in name)
    assert any("multi_modal_projector" in name for name in changed) and any("v_proj" in name for name in changed)
    table = next(name for name in changed if "embed_tokens" in name)
    rows = (before[table] != after[table]).any(dim=1).nonzero().flatten().tolist()
    assert rows == [6, 7, 8]  # the start, latent and end tokens


def test_it_is_exported_and_answers(unbroken: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = unbroken.folder / "stage_1"
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    assert float(capsys.readouterr().out.split("at most ")[1].rstrip(")\n")) < 1e-5
    loaded = load(checkpoint)
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    ids = loaded.tokenizer("start a4 ?", return_tensors="pt")["input_ids"]
    tiles = torch.zeros(1, 3, 112, 112, dtype=torch.uint8)
    new = loaded.model.generate(pixel_values=tiles, input_ids=ids, num_patches=torch.tensor([1]), max_new_tokens=4)
    assert new.shape[0] == 1


def test_other_adapters_do_not_go_on(home: Path, unbroken: Run) -> None:
    other = start(home, "tuned", *TUNED, "lora_rank=8", ranks=1)
    assert other.finish() == [2]
    assert "is of another run: lora_rank was 4 and is 8" in other.text
