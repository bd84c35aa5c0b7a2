"""What the latent loop is held against: one sample at a time, no cache, no padding, the whole prefix each pass."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from coconut.model import MultimodalCoconut

VOCAB, EOS, IMAGE, START, LATENT, END = 100, 1, 95, 96, 97, 98
TILE, TOKENS_PER_PATCH = 16, 4


def tiny_internvl(attn: str = "sdpa", tie: bool = False, hidden: int = 32) -> InternVLForConditionalGeneration:
    config = InternVLConfig(
        vision_config=dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                           image_size=[TILE, TILE], patch_size=[4, 4], use_mean_pooling=True,
                           layer_scale_init_value=0.5),
        text_config=dict(model_type="qwen2", hidden_size=hidden, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=64, vocab_size=VOCAB, max_position_embeddings=512,
                         bos_token_id=None, eos_token_id=EOS, pad_token_id=0, initializer_range=0.1,
                         tie_word_embeddings=tie),
        image_token_id=IMAGE, downsample_ratio=0.5, tie_word_embeddings=tie,
    )  # fmt: skip
    config._attn_implementation = attn
    return InternVLForConditionalGeneration(config)


def tiny_qwen2_5_vl(attn: str = "sdpa") -> Qwen2_5_VLForConditionalGeneration:
    """A tile of 16 x 16 pixels makes 2 x 2 image tokens, as those of `tiny_internvl` do."""
    config = Qwen2_5_VLConfig(
        vision_config=dict(hidden_size=16, depth=2, num_heads=2, intermediate_size=32, patch_size=4, out_hidden_size=32,
                           spatial_merge_size=2, window_size=16, fullatt_block_indexes=[1], initializer_range=0.1),
        text_config=dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=64, vocab_size=VOCAB, max_position_embeddings=512, bos_token_id=None,
                         eos_token_id=EOS, pad_token_id=0, initializer_range=0.1, use_sliding_window=False,
                         rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
        image_token_id=IMAGE, tile_size=TILE, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = attn
    return Qwen2_5_VLForConditionalGeneration(config)


def tiny_text(kind: str, attn: str = "sdpa", sliding_window: int | None = None) -> torch.nn.Module:
    common = dict(vocab_size=VOCAB, eos_token_id=EOS, bos_token_id=None, pad_token_id=0, attn_implementation=attn)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, resid_pdrop=0.0,
                                          embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1, **common))  # fmt: skip
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=64, max_position_embeddings=256, initializer_range=0.1)  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **common))
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes, **common, sliding_window=sliding_window))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, **common, head_dim=8))
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **common))


def wrap(base: torch.nn.Module) -> MultimodalCoconut:
    return MultimodalCoconut(base, LATENT, START, END, EOS)


def make_row(generator: torch.Generator, n_latents: int, n_images: int = 0, words: int = 5, target: int = 4) -> dict:
    """One sample: ids, labels and normalised tiles [n_images, 3, TILE, TILE] (float64)."""

    def draw(n: int) -> list[int]:
        return torch.randint(2, 90, (n,), generator=generator).tolist()

    prompt = draw(words)
    for _ in range(n_images):
        prompt += [IMAGE] * TOKENS_PER_PATCH + draw(1)
    span = [START] + [LATENT] * n_latents + [END] if n_latents else []
    answer = [*draw(target), EOS]
    return {
        "ids": prompt + span + answer,
        "labels": [-100] * (len(prompt) + len(span)) + answer,
        "tiles": torch.randn(n_images, 3, TILE, TILE, generator=generator, dtype=torch.float64),
    }


def batch_rows(rows: list[dict], align: bool = True, dtype: torch.dtype = torch.float64) -> dict:
    """Pad to one batch; with `align`, rows are moved right until their first latents share a column."""
    first = [row["ids"].index(LATENT) if LATENT in row["ids"] else None for row in rows]
    target = max([f for f in first if f is not None], default=0)
    left = [target - f if align and f is not None else 0 for f in first]
    length = max(n + len(row["ids"]) for n, row in zip(left, rows, strict=True))

    def pad(name: str, value: int) -> Tensor:
        return torch.tensor([[value] * n + r[name] + [value] * (length - n - len(r[name]))
                             for n, r in zip(left, rows, strict=True)])  # fmt: skip

    for row in rows:
        row["mask"] = [1] * len(row["ids"])
    tiles = torch.cat([row["tiles"] for row in rows]).to(dtype)
    return {
        "input_ids": pad("ids", 0),
        "attention_mask": pad("mask", 0),
        "labels": pad("labels", -100),
        "pixel_values": tiles if len(tiles) else None,
    }


def naive_loss(model: MultimodalCoconut, rows: list[dict], dtype: torch.dtype = torch.float64) -> Tensor:
    """Sum of the label tokens' cross-entropy over the rows, by recomputing the whole prefix for every latent."""
    base, decoder = model.base_model, model.backbone.decoder
    total = torch.zeros((), dtype=dtype)
    for row in rows:
        ids = torch.tensor([row["ids"]])
        embeds = base.get_input_embeddings()(ids)
        if len(row["tiles"]):
            features = base.model.get_image_features(
                pixel_values=row["tiles"].to(dtype), return_dict=True
            ).pooler_output
            embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features.to(embeds.dtype))
        for column in [i for i, token in enumerate(row["ids"]) if token == LATENT]:
            hidden = decoder(inputs_embeds=embeds[:, :column], use_cache=False).last_hidden_state
            embeds = torch.cat([embeds[:, :column], hidden[:, -1:], embeds[:, column + 1 :]], dim=1)
        hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = base.get_output_embeddings()(hidden)[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")
    return total


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest absolute difference of two gradients; a missing entry counts as zero."""
    worst = 0.0
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        worst = max(worst, float((a - b).abs().max()))
    return worst


@contextmanager
def float64_everywhere():
    """transformers computes RMSNorm and eager attention's softmax in float32 whatever the model's dtype."""
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen3 import modeling_qwen3

    def norm(self: torch.nn.Module, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * scaling
        weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    with ExitStack() as patches:
        for target in (
            modeling_qwen2.Qwen2RMSNorm,
            modeling_llama.LlamaRMSNorm,
            modeling_mistral.MistralRMSNorm,
            modeling_qwen3.Qwen3RMSNorm,
            modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm,
        ):
            patches.enter_context(mock.patch.object(target, "forward", norm))
        for target in (modeling_qwen2, modeling_llama, modeling_mistral, modeling_qwen3, modeling_qwen2_5_vl):
            patches.enter_context(mock.patch.object(target, "eager_attention_forward", attention))
        yield
