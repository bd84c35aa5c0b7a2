"""The comparison is fair: the original algorithm gives our loss and our gradients, and the same tokens."""

from __future__ import annotations

import pytest
import torch

from benchmarks.original import OriginalCoconut
from benchmarks.sides import ABLATION
from tests.model.reference import (
    EOS,
    LATENT,
    batch_rows,
    float64_everywhere,
    gradients,
    largest_difference,
    make_row,
    tiny_text,
    wrap,
)


def rows(latents: tuple[int, ...]) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    return [make_row(generator, k, words=3 + k, target=2 + k) for k in latents]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
@pytest.mark.parametrize("flags", ABLATION.values(), ids=ABLATION.keys())
@pytest.mark.parametrize("latents", [(3, 1, 2), (0, 0)])
def test_loss_and_gradients_equal_ours(kind: str, flags: dict, latents: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    with float64_everywhere():
        model = wrap(tiny_text(kind).double())
        batch = batch_rows(rows(latents))
        original = OriginalCoconut(model.base_model, LATENT, EOS, **flags)
        mask, labels = batch["attention_mask"], batch["labels"]
        theirs = original(batch["input_ids"], mask, labels, (mask.cumsum(-1) - 1).clamp(min=0))
        theirs.loss.backward()
        expected = gradients(model)
        ours = model(**batch, loss_only=True)
        ours.loss.backward()
        assert float((ours.loss - theirs.loss).abs().detach()) < 1e-9
        assert largest_difference(gradients(model), expected) < 1e-9
    assert original.n_forwards == max(latents) + 1


def test_greedy_tokens_equal_ours() -> None:
    torch.manual_seed(0)
    model = wrap(tiny_text("qwen2"))
    row = make_row(torch.Generator().manual_seed(2), 3)
    prompt = torch.tensor([row["ids"][:-3]])
    ours = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    original = OriginalCoconut(model.base_model, LATENT, eos_token_id=-1)
    assert original.generate(prompt, 8) == ours[0].tolist()
    assert original.n_forwards == 3 + 1 + 7
