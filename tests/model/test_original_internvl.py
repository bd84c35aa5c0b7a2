"""The original InternVL3 layout, written here from its published configuration, loads and exports bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from coconut.model import MultimodalCoconut
from coconut.model.backbones.original_internvl import export_original
from coconut.model.tiny import build_word_tokenizer
from coconut.types import CheckpointError
from tests.distributed.launcher import run_ranks

DIM, LAYERS, HEADS, TEXT, TILE, PATCH = 32, 2, 2, 32, 56, 14
TOKENS = (TILE // PATCH // 2) ** 2


def layout(vocabulary: int, mlp: int = 64, layers: int = 2) -> tuple[dict, dict[str, Tensor]]:
    """config.json and random weights, named and shaped as in OpenGVLab/InternVL3-1B-Pretrained."""
    text = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=TEXT, intermediate_size=mlp,
                num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, vocab_size=vocabulary,
                rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=dict(factor=2.0, rope_type="dynamic", type="dynamic"),
                max_position_embeddings=512, tie_word_embeddings=False, torch_dtype="bfloat16")  # fmt: skip
    vision = dict(architectures=["InternVisionModel"], model_type="intern_vit_6b", hidden_size=DIM, image_size=TILE,
                  intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS, patch_size=PATCH,
                  num_channels=3, qk_normalization=False, qkv_bias=True, norm_type="layer_norm", hidden_act="gelu",
                  layer_norm_eps=1e-6, initializer_range=1e-10, drop_path_rate=0.1, use_flash_attn=True)  # fmt: skip
    config = dict(architectures=["InternVLChatModel"], model_type="internvl_chat", downsample_ratio=0.5,
                  force_image_size=TILE, llm_config=text, vision_config=vision, ps_version="v2", select_layer=-1,
                  template="internvl2_5", torch_dtype="bfloat16")  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, DIM),
        "vision_model.embeddings.position_embedding": (1, 1 + (TILE // PATCH) ** 2, DIM),
        "vision_model.embeddings.patch_embedding.weight": (DIM, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (DIM,),
    }
    for layer in range(LAYERS):
        names = {"ls1": (DIM,), "ls2": (DIM,)}
        for module, (out, into) in {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM), "mlp.fc1": (64, DIM),
                                    "mlp.fc2": (DIM, 64)}.items():  # fmt: skip
            names |= {f"{module}.weight": (out, into), f"{module}.bias": (out,)}
        names |= {f"{norm}.{kind}": (DIM,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"vision_model.encoder.layers.{layer}.{name}": shape for name, shape in names.items()}
    shapes |= {"mlp1.0.weight": (4 * DIM,), "mlp1.0.bias": (4 * DIM,), "mlp1.1.weight": (TEXT, 4 * DIM),
               "mlp1.1.bias": (TEXT,), "mlp1.3.weight": (TEXT, TEXT), "mlp1.3.bias": (TEXT,)}  # fmt: skip
    language = Qwen2ForCausalLM(Qwen2Config(**text))
    shapes |= {f"language_model.{name}": tuple(p.shape) for name, p in language.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    return config, {k: (torch.randn(s, generator=generator) * 0.2).bfloat16() for k, s in shapes.items()}


@pytest.fixture(params=["one file", "sharded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tokenizer = build_word_tokenizer(("\n", "red", "blue"))
    config, weights = layout(len(tokenizer))
    out = tmp_path / "original"
    tokenizer.save_pretrained(out)
    save_torch_state_dict(weights, out, max_shard_size="5GB" if request.param == "one file" else "40KB")
    assert (out / "model.safetensors.index.json").exists() == (request.param == "sharded")
    (out / "config.json").write_text(json.dumps(config))
    return out


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {key: w for file in sorted(folder.glob("*.safetensors")) for key, w in load_file(file).items()}


def original_features(w: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """InternViT, pixel shuffle v2 and mlp1, from their published definition."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    e = "vision_model.embeddings."
    x = F.conv2d(pixels, w[e + "patch_embedding.weight"], w[e + "patch_embedding.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w[e + "class_embedding"].expand(len(x), -1, -1), x], 1) + w[e + "position_embedding"]
    for layer in range(LAYERS):
        p = f"vision_model.encoder.layers.{layer}."
        b, n, c = x.shape
        qkv = linear(norm(x, p + "norm1", 1e-6), p + "attn.qkv").reshape(b, n, 3, HEADS, c // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * (c // HEADS) ** -0.5) @ k.transpose(-2, -1)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c), p + "attn.proj") * w[p + "ls1"]
        x = x + linear(F.gelu(linear(norm(x, p + "norm2", 1e-6), p + "mlp.fc1")), p + "mlp.fc2") * w[p + "ls2"]
    side = TILE // PATCH
    x = x[:, 1:].reshape(len(x), side, side, DIM)
    x = x.view(len(x), side, side // 2, 2 * DIM).permute(0, 2, 1, 3).reshape(len(x), side // 2, side // 2, 4 * DIM)
    x = x.permute(0, 2, 1, 3).reshape(len(x), -1, 4 * DIM)
    return linear(F.gelu(linear(norm(x, "mlp1.0", 1e-5), "mlp1.1")), "mlp1.3")


def test_logits_are_those_of_the_published_definition(folder: Path) -> None:
    model = MultimodalCoconut.from_pretrained(folder)
    assert model.base_model.dtype == torch.bfloat16 and model.tokens_per_patch == TOKENS
    model = model.float().eval()
    w = {key: weight.float() for key, weight in weights_of(folder).items()}
    pixels = torch.randn(2, 3, TILE, TILE, generator=torch.Generator().manual_seed(1))
    image = model.backbone.image_token_id
    ids = torch.tensor([[9, 10, *[image] * (2 * TOKENS), 11, 10]])
    language = Qwen2ForCausalLM(Qwen2Config(**layout(int(model.backbone.text_config.vocab_size))[0]["llm_config"]))
    language.load_state_dict({k.removeprefix("language_model."): v for k, v in w.items() if k.startswith("language")})
    embeds = language.float().get_input_embeddings()(ids)
    embeds[ids == image] = original_features(w, pixels).reshape(-1, TEXT)
    with torch.no_grad():
        ours = model(ids, pixel_values=pixels).logits
        theirs = language.eval()(inputs_embeds=embeds).logits
    assert torch.allclose(ours, theirs, atol=1e-4), float((ours - theirs).abs().max())


def test_export_is_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    model = MultimodalCoconut.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    export_original(model.base_model.state_dict(), config, tmp_path / "back")
    before, after = weights_of(folder), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert weight.dtype == after[key].dtype and torch.equal(weight, after[key]), key
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_a_tied_table_is_exported_and_loads_again(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(("\n", "red", "blue"))
    config, weights = layout(len(tokenizer))
    config["llm_config"]["tie_word_embeddings"] = True
    del weights["language_model.lm_head.weight"]
    tokenizer.save_pretrained(tmp_path / "original")
    save_torch_state_dict(weights, tmp_path / "original")
    (tmp_path / "original" / "config.json").write_text(json.dumps(config))
    model = MultimodalCoconut.from_pretrained(tmp_path / "original")
    export_original(model.base_model.state_dict(), config, tmp_path / "back")
    after = weights_of(tmp_path / "back")
    assert weights.keys() == after.keys() and all(torch.equal(weights[key], after[key]) for key in weights)
    tokenizer.save_pretrained(tmp_path / "back")
    again = MultimodalCoconut.from_pretrained(tmp_path / "back")
    assert torch.equal(again.base_model.get_output_embeddings().weight, model.base_model.get_output_embeddings().weight)


def test_faults_are_named(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights"):
        MultimodalCoconut.from_pretrained(folder)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_load_it_partitioned(tmp_path: Path) -> None:
    """Beyond its partition each rank adds less than two shard files of 45 MB; the whole is 230 MB."""
    tokenizer = build_word_tokenizer(("\n", "red", "blue"))
    config, weights = layout(len(tokenizer), mlp=100_000, layers=12)
    tokenizer.save_pretrained(tmp_path)
    save_torch_state_dict(weights, tmp_path, max_shard_size="50MB")
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = run_ranks("tests.distributed.original_worker", str(tmp_path), str(90_000_000))
    assert output.count("weights all equal") == 2
