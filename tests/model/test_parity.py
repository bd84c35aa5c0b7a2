"""Loss and every gradient equal the naive loop's in float64; each claim also shows that it can fail."""

from __future__ import annotations

import pytest
import torch

from coconut.model import pass_cache
from tests.model.reference import (
    batch_rows,
    float64_everywhere,
    gradients,
    largest_difference,
    make_row,
    naive_loss,
    tiny_internvl,
    tiny_text,
    wrap,
)

TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def double_precision():
    with float64_everywhere():
        yield


def ragged_rows(seed: int, images: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    latents, pictures, words = (0, 3, 1, 2, 3), (1, 0, 2, 1, 3), (5, 3, 9, 4, 2)
    return [
        make_row(generator, k, n if images else 0, w, 3 + k) for k, n, w in zip(latents, pictures, words, strict=True)
    ]


def both(model, rows, align=True):
    model.zero_grad()
    expected = naive_loss(model, rows)
    expected.backward()
    theirs = gradients(model)
    out = model(**batch_rows(rows, align), loss_only=True, num_items_in_batch=1)
    out.loss.backward()
    return float((out.loss - expected).abs()), largest_difference(gradients(model), theirs)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("align", [True, False])
def test_internvl_ragged(attn: str, checkpointed: bool, align: bool) -> None:
    torch.manual_seed(0)
    model = wrap(tiny_internvl(attn).double())
    if checkpointed:
        model.gradient_checkpointing_enable()
    loss, gradient = both(model, ragged_rows(1, images=True), align)
    assert loss < TOLERANCE and gradient < TOLERANCE, (loss, gradient)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_text_backbones_ragged(kind: str, checkpointed: bool) -> None:
    torch.manual_seed(0)
    model = wrap(tiny_text(kind).double())
    if checkpointed:
        model.gradient_checkpointing_enable()
    loss, gradient = both(model, ragged_rows(2, images=False))
    assert loss < TOLERANCE and gradient < TOLERANCE, (loss, gradient)


def test_several_spans_with_text_between() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    a, b = make_row(generator, 2, 1), make_row(generator, 3)
    row = {"ids": a["ids"] + b["ids"], "labels": a["labels"] + b["labels"], "tiles": a["tiles"]}
    model = wrap(tiny_internvl().double())
    loss, gradient = both(model, [row, *ragged_rows(4, images=True)])
    assert loss < TOLERANCE and gradient < TOLERANCE, (loss, gradient)


def test_full_logits_give_the_same_loss() -> None:
    torch.manual_seed(0)
    model = wrap(tiny_internvl().double())
    batch = batch_rows(ragged_rows(5, images=True))
    full, short = model(**batch), model(**batch, loss_only=True)
    assert full.logits.shape == (*batch["input_ids"].shape, 100) and short.logits is None
    assert float((full.loss - short.loss).abs()) < 1e-12


def test_more_head_calls_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = wrap(tiny_internvl().double())
    monkeypatch.setattr("coconut.model.loss.CHUNK_TOKENS", 5)
    loss, gradient = both(model, ragged_rows(6, images=True))
    assert loss < TOLERANCE and gradient < TOLERANCE, (loss, gradient)


@pytest.mark.parametrize("fault", ["thoughts", "cache", "no feedback", "padding"])
def test_the_comparison_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the gradient through thoughts or cache, or dropping feedback or mask, must break the parity."""
    torch.manual_seed(0)
    model = wrap(tiny_internvl().double())
    rows = ragged_rows(1, images=True)
    model.zero_grad()
    expected = naive_loss(model, rows)
    expected.backward()
    theirs = gradients(model)
    batch = batch_rows(rows)
    if fault == "cache":
        monkeypatch.setattr(pass_cache._PassLayer, "update", _detached(pass_cache._PassLayer.update))
    elif fault == "padding":
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    else:
        transform = {"thoughts": lambda h, k: h.detach(), "no feedback": lambda h, k: torch.zeros_like(h)}[fault]
        batch["thought_transform"] = transform
    model(**batch, loss_only=True, num_items_in_batch=1).loss.backward()
    assert largest_difference(gradients(model), theirs) > 1e-4


def _detached(update):
    def detached_update(self, keys, values, *args, **kwargs):
        self.columns.parts[:] = [(k.detach(), v.detach()) for k, v in self.columns.parts]
        return update(self, keys, values, *args, **kwargs)

    return detached_update
