"""The analytic count against torch's own counter, which watches every matrix product of a real model."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, InternVLConfig, InternVLForConditionalGeneration

from coconut.evaluation import flops


def _internvl() -> InternVLForConditionalGeneration:
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [28, 28],
            "patch_size": [7, 7],
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": 50,
        },
        image_token_id=5,
        downsample_ratio=0.5,
    )
    config._attn_implementation = "eager"  # the counter sees its products one by one
    return InternVLForConditionalGeneration(config).eval()


def _counted(model: torch.nn.Module, **inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


def test_text_and_vision_equal_the_counter() -> None:
    model = _internvl()
    n_tokens, n_rows, n_image_tokens = 21, 3, 4
    ids = torch.randint(6, 50, (n_rows, n_tokens))
    ids[:, 1 : 1 + n_image_tokens] = 5
    counted = _counted(model, input_ids=ids, pixel_values=torch.randn(n_rows, 3, 28, 28))
    ours = flops.forward_flops(model.config, n_rows * n_tokens, n_rows, n_samples=n_rows)
    # Eager attention computes the pairs that the causal mask throws away as well; they are not counted here.
    masked_pairs = n_rows * n_tokens * (n_tokens - 1) // 2
    expected = ours + flops.attention_flops_per_pair(model.config.text_config) * masked_pairs
    # transformers 5.17 makes the rotary angles by a matrix product, which is not counted here either.
    text = model.config.text_config
    angles = 2 * n_tokens * (text.hidden_size // text.num_attention_heads) // 2
    assert counted - expected in (0, angles)


def test_text_only_models_without_a_gate() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32, attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    counted = _counted(model, input_ids=torch.randint(0, 60, (2, 16)))
    masked_pairs = 2 * 16 * 15 // 2
    ours = flops.forward_flops(config, 32, n_samples=2) + flops.attention_flops_per_pair(config) * masked_pairs
    assert ours == counted


def test_training_is_three_forwards_and_recomputing_a_fourth() -> None:
    config = _internvl().config
    forward = flops.forward_flops(config, 100, 2, n_samples=4, n_logit_tokens=10)
    assert flops.training_flops(config, 100, 2, n_samples=4, n_logit_tokens=10) == 3 * forward
    assert flops.training_flops(config, 100, 2, n_samples=4, n_logit_tokens=10, recompute=True) == 4 * forward


def test_generation_reads_every_token_but_the_last() -> None:
    config = _internvl().config
    assert flops.generation_flops(config, 20, 1) == flops.forward_flops(config, 20, n_logit_tokens=1)
    assert flops.generation_flops(config, 20, 3) == flops.forward_flops(config, 22, n_logit_tokens=3)


def test_logits_and_patches_only_where_asked_for() -> None:
    config = _internvl().config
    per_logit = 2 * 64 * 50
    assert flops.forward_flops(config, 10) - flops.forward_flops(config, 10, n_logit_tokens=4) == 6 * per_logit
    with_images = flops.forward_flops(config, 10, 3) - flops.forward_flops(config, 10)
    assert with_images == 3 * flops.patch_flops(config)
