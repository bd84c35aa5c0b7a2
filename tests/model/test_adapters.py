"""Frozen parts, LoRA and the latent tokens' rows: what learns, with which gradients, and what a saved folder holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from coconut.model import MultimodalCoconut
from coconut.model.adapters import ROWS, LoraSettings, check_trained, choose_trained
from coconut.model.backbones import backbone_class
from coconut.types import ConfigError, StageSpec
from tests.model.reference import (
    END,
    EOS,
    LATENT,
    START,
    batch_rows,
    float64_everywhere,
    gradients,
    largest_difference,
    make_row,
    naive_loss,
    tiny_internvl,
    tiny_qwen2_5_vl,
    tiny_text,
)

LORA = LoraSettings(rank=4, alpha=8.0)


def build(kind: str = "internvl", dtype: torch.dtype = torch.float64, attn: str = "eager") -> MultimodalCoconut:
    torch.manual_seed(3)
    makers = {"internvl": tiny_internvl, "tied": lambda a: tiny_internvl(a, tie=True), "qwen2_5_vl": tiny_qwen2_5_vl}
    base = makers[kind](attn) if kind in makers else tiny_text(kind, attn)
    return MultimodalCoconut(base.to(dtype).eval(), LATENT, START, END, EOS)


def stir(model: MultimodalCoconut) -> None:
    """Adapters begin as zero: a test of those would find all of them right."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ROWS in name:
            torch.nn.init.normal_(parameter, std=0.1)


def rows(n_images: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [make_row(generator, latents, n_images) for latents in (0, 2, 3)]


@pytest.mark.parametrize("kind", ["internvl", "tied", "gpt2"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_the_naive_loop(kind: str, checkpointed: bool) -> None:
    model = build(kind)
    choose_trained(model, ["vision"] if kind != "gpt2" else [], LORA, seed=0)
    stir(model)
    if checkpointed:
        model.gradient_checkpointing_enable()
    data = rows(0 if kind == "gpt2" else 1)
    with float64_everywhere():
        naive_loss(model, data).backward()
        expected = gradients(model)
        loss = model(**batch_rows(data), loss_only=True, num_items_in_batch=1.0).loss
        loss.backward()
    found = gradients(model)
    assert largest_difference(found, expected) < 1e-9
    assert all("lora_" in name or ROWS in name or "projector" in name for name in found)
    assert any(ROWS in name for name in found) and any("lora_A" in name for name in found)
    assert max(float(gradient.abs().max()) for name, gradient in found.items() if ROWS in name) > 1e-3


def test_adapters_change_nothing_before_they_have_learnt() -> None:
    model, data = build(), batch_rows(rows(1))
    before = model(**data).logits
    choose_trained(model, [], LORA, seed=0)
    assert torch.equal(model(**data).logits, before)
    stir(model)
    assert not torch.allclose(model(**data).logits, before)


def test_the_seed_alone_decides_their_weights() -> None:
    def first(seed: int, drawn_before: int) -> torch.Tensor:
        model = build()
        torch.manual_seed(drawn_before)
        choose_trained(model, [], LORA, seed=seed)
        assert torch.initial_seed() == drawn_before
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first(0, 1), first(0, 2)) and not torch.equal(first(0, 1), first(1, 1))


@pytest.mark.parametrize("kind", ["internvl", "tied", "gpt2", "qwen2_5_vl"])
def test_a_saved_folder_is_merged_and_loads_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    model = build(kind, torch.float32, "sdpa")
    model.stage_spec = StageSpec(stage=1, n_skip_steps=1, n_latents=2, c_thought=2)
    n_parameters = sum(1 for _ in model.base_model.state_dict())
    choose_trained(model, [], LORA, seed=0)
    stir(model)
    model.save_pretrained(tmp_path / "merged")
    auto_class = backbone_class(model.base_model.config.model_type).auto_class
    plain = auto_class.from_pretrained(tmp_path / "merged").eval()
    assert sum(1 for _ in plain.state_dict()) == n_parameters
    ids = torch.tensor([[5, START, LATENT, 9, END, 12]])
    with torch.no_grad():
        ours = model.base_model(input_ids=ids).logits
        assert float((plain(input_ids=ids).logits - ours).abs().max()) < 1e-5
        data = batch_rows(rows(0), dtype=torch.float32)
        again = MultimodalCoconut(plain, LATENT, START, END, EOS)
        assert float((again(**data).logits - model(**data).logits).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["internvl", "gpt2"])
def test_dropout_of_keys_and_values_is_recomputed_as_it_was(kind: str) -> None:
    """Keys and values that were given back come again out of the same draws."""
    found = []
    for checkpointed in (False, True):
        model = build(kind)
        choose_trained(model, [], LoraSettings(rank=4, alpha=8.0, dropout=0.5), seed=0)
        stir(model)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(9)
        loss = model(**batch_rows(rows(0)), loss_only=True, num_items_in_batch=1.0).loss
        loss.backward()
        found.append({**gradients(model), "loss": loss.detach()})
    assert largest_difference(*found) < 1e-9


@pytest.mark.parametrize(
    ("kind", "freeze", "lora", "said"),
    [
        ("gpt2", ["vision"], None, "freeze names vision: GPT2LMHeadModel has the parts language, embeddings"),
        ("gpt2", ["language", "embeddings"], None, "names every part of GPT2LMHeadModel .* leave one out, or set lora"),
        ("internvl", ["vision", "projector", "language", "embeddings"], None, "nothing is left to train"),
        (
            "internvl",
            [],
            LoraSettings(4, 8.0, targets=("q_proj", "query", "k_pro")),
            "names query, k_pro, which no linear layer of Qwen2Model is called; its layers are q_proj, k_proj, v_proj",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(kind: str, freeze: list[str], lora: LoraSettings | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_trained(build(kind).backbone, freeze, lora)


def test_peft_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="lora_rank needs peft: pip install"):
        check_trained(build().backbone, [], LORA)


@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl"])
def test_parts_hold_every_weight_once(kind: str) -> None:
    model = build(kind)
    parts = model.backbone.parts
    assert list(parts) == ["vision", "projector", "language", "embeddings"] and all(parts.values())
    listed = [id(parameter) for part in parts.values() for parameter in part]
    assert len(set(listed)) == len(listed) and set(listed) == {id(p) for p in model.parameters()}


def test_targets_are_names_or_their_ends() -> None:
    model = build()
    choose_trained(model, [], LoraSettings(4, 8.0, targets=("q_proj", "layers.1.mlp.up_proj")), seed=0)
    names = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert {name.rpartition("layers.")[2] for name in names} == {
        "0.self_attn.q_proj", "1.self_attn.q_proj", "2.self_attn.q_proj", "1.mlp.up_proj",
    }  # fmt: skip
