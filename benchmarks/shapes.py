"""Which models and batches are measured: presets, random weights, random tokens.

    row: prefix (text, image tokens) | K latents | end-latent | label tokens

Shapes: B rows, L columns.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)

from coconut import MultimodalCoconut


@dataclass(frozen=True)
class Shape:
    """A model and a batch; lengths in tokens."""

    family: str = "qwen2"  # qwen2, gpt2 or internvl
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 1024
    vocab: int = 151_674
    prefix: int = 1024  # columns before the first latent
    latents: int = 6
    labels: int = 32
    batch: int = 4
    tiles: int = 0  # image tiles a row, 256 tokens of the prefix each
    dtype: str = "float32"

    @property
    def length(self) -> int:
        return self.prefix + self.latents + 1 + self.labels

    @property
    def ids(self) -> dict[str, int]:
        """The last ids of the vocabulary are the special ones; ordinary tokens are drawn below them."""
        names = ("eos", "image", "start", "latent", "end")
        return {name: self.vocab - 1 - number for number, name in enumerate(names)}


#: slim: InternVL3's vocabulary on a decoder that fits two CPU cores, every key/value head its own.
#: gpt2: GPT-2 124M at Meta's settings for GSM8k (args/gsm_coconut.yaml there: float32, 32 rows a device, c_thought 2,
#:   three latent stages, hence K = 6; in the last stage the answer alone is learnt). The data set gives the lengths: we
#:   take a question of 64 tokens and an answer of 6.
#: internvl3-1b: the published sizes, three tiles a row; for a GPU.
#: toy: for the tests.
PRESETS = {
    "slim": Shape(),
    "gpt2": Shape("gpt2", 12, 768, 12, 12, 3072, 50_260, prefix=64, labels=6, batch=32),
    "internvl3-1b": Shape("internvl", 24, 896, 14, 2, 4864, prefix=1024, tiles=3, dtype="bfloat16"),
    "toy": Shape(layers=2, hidden=32, heads=4, kv_heads=2, mlp=64, vocab=200, prefix=24, latents=3, labels=5, batch=2),
}


def add_shape_arguments(parser: argparse.ArgumentParser, preset: str = "slim") -> None:
    """--preset, and one option for each field of a `Shape`."""
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default=preset, help="model and batch (default: %(default)s)"
    )
    for field in fields(Shape):
        kind = str if field.name in ("family", "dtype") else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help="instead of the preset's")


def shape_from(arguments: argparse.Namespace) -> Shape:
    given = {field.name: getattr(arguments, field.name) for field in fields(Shape)}
    return replace(PRESETS[arguments.preset], **{name: value for name, value in given.items() if value is not None})


def text_config(shape: Shape) -> Any:
    n_positions = max(2048, 2 * shape.length)
    common: dict[str, Any] = dict(vocab_size=shape.vocab, eos_token_id=shape.ids["eos"], bos_token_id=None)
    if shape.family == "gpt2":
        no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        sizes = dict(n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads, n_inner=shape.mlp)
        return GPT2Config(n_positions=n_positions, **sizes, **no_dropout, **common)
    return Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        max_position_embeddings=n_positions,
        tie_word_embeddings=True,
        pad_token_id=None,
        **common,
    )


def build_model(shape: Shape, device: str, seed: int = 0) -> MultimodalCoconut:
    """Random weights, the same for the same seed; SDPA attention, embeddings tied to the head."""
    torch.manual_seed(seed)
    config = text_config(shape)
    ids = shape.ids
    with torch.device(device):
        if shape.family == "internvl":
            config = InternVLConfig(
                vision_config=InternVLVisionConfig(),
                text_config=config,
                image_token_id=ids["image"],
                tie_word_embeddings=True,
            )
            base: Any = InternVLForConditionalGeneration(config)
        else:
            base = AutoModelForCausalLM.from_config(config)
    base = base.to(getattr(torch, shape.dtype))
    return MultimodalCoconut(base, ids["latent"], ids["start"], ids["end"], ids["eos"]).train()


def build_batch(shape: Shape, device: str, seed: int = 1) -> dict[str, Tensor]:
    """input_ids, labels and attention_mask [B, L], and pixel_values where there are tiles."""
    draw = torch.Generator().manual_seed(seed)
    ids = shape.ids
    input_ids = torch.randint(0, ids["end"], (shape.batch, shape.length), generator=draw)
    input_ids[:, 1 : 1 + 256 * shape.tiles] = ids["image"]
    span = slice(shape.prefix, shape.prefix + shape.latents)
    input_ids[:, shape.prefix - 1] = ids["start"]
    input_ids[:, span] = ids["latent"]
    input_ids[:, span.stop] = ids["end"]
    labels = torch.full_like(input_ids, -100)
    labels[:, span.stop + 1 :] = input_ids[:, span.stop + 1 :]
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}
    if shape.tiles:
        batch["pixel_values"] = torch.randn(shape.batch * shape.tiles, 3, 448, 448, generator=draw)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def describe(shape: Shape) -> dict[str, Any]:
    return {**asdict(shape), "length": shape.length}
