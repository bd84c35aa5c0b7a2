"""Checkpoints: new tokens' embeddings, what is saved beside the weights, and what is said of damaged folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from coconut.model import MultimodalCoconut
from coconut.model.tiny import build_tiny_causal, build_word_tokenizer, save_tiny
from coconut.types import SPECIAL_TOKENS, CheckpointError, ConfigError, PromptTemplate, StageSpec
from coconut.utils.tokenizer import load_tokenizer

WORDS = ("\n", "red", "blue", "###")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A causal model and tokenizer that know the latent tokens."""
    tokenizer = build_word_tokenizer(WORDS)
    save_tiny(build_tiny_causal("qwen2", tokenizer, seed=1), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """A published model as it is: neither tokenizer nor weights know the latent tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    save_tiny(build_tiny_causal("llama", tokenizer, seed=1), tokenizer, tmp_path / "plain")
    return tmp_path / "plain"


def test_new_tokens_start_from_the_line_break(plain_folder: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(plain_folder)
    model = MultimodalCoconut.from_pretrained(plain_folder)
    tokenizer = load_tokenizer(plain_folder)
    assert model.latent_ids == tuple(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    for after_table, before_table in (
        (model.base_model.get_input_embeddings(), before.get_input_embeddings()),
        (model.base_model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        line_break = before_table.weight[tokenizer.convert_tokens_to_ids("\n")]
        for token_id in model.latent_ids:
            assert torch.equal(after_table.weight[token_id], line_break)
        assert torch.equal(after_table.weight[: before_table.weight.shape[0]], before_table.weight)


def test_known_tokens_keep_their_embedding(folder: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(folder)
    model = MultimodalCoconut.from_pretrained(folder)
    assert torch.equal(model.base_model.get_input_embeddings().weight, before.get_input_embeddings().weight)


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    model = MultimodalCoconut.from_pretrained(folder)
    model.prompt_template = PromptTemplate(prefix=(1,), suffix=(9,))
    model.stage_spec = StageSpec(stage=2, n_skip_steps=2, n_latents=4, c_thought=2)
    model.metadata = {"scores": {"test": 0.5}}
    model.save_pretrained(tmp_path / "saved")
    load_tokenizer(folder).save_pretrained(tmp_path / "saved")
    again = MultimodalCoconut.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[9, 10, model.start_latent_id, model.latent_token_id, model.end_latent_id, 11]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.prompt_template == model.prompt_template
    assert again.stage_spec == model.stage_spec
    assert again.metadata == model.metadata
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # what other tools do
    assert torch.equal(plain(ids[:, :2]).logits, model(ids[:, :2]).logits)


def test_faults_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        MultimodalCoconut.from_pretrained(tmp_path / "nowhere")
    (folder / "coconut.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"coconut\.json is damaged"):
        MultimodalCoconut.from_pretrained(folder)
    (folder / "coconut.json").unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot load weights"):
        MultimodalCoconut.from_pretrained(folder)
