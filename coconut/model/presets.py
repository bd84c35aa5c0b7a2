"""Published shapes of InternVL3, to plan with where no checkpoint is at hand: configurations without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

from coconut.types import ConfigError

_VOCABULARY = 151_674
#: InternViT-300M, which the class's defaults describe, and InternViT-6B.
_VISION_300M: dict[str, Any] = {}
_VISION_6B = dict(
    hidden_size=3200,
    num_hidden_layers=45,
    num_attention_heads=25,
    intermediate_size=12_800,
    use_qk_norm=True,
    norm_type="rms_norm",
    attention_bias=False,
)


@dataclass(frozen=True)
class InternVL3:
    """One of the published sizes: a vision tower and a Qwen2.5 decoder."""

    vision: dict[str, Any]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


#: InternVL3-1B: InternViT-300M and Qwen2.5-0.5B; 8B: and Qwen2.5-7B; 38B: InternViT-6B and Qwen2.5-32B; 78B: and 72B.
PRESETS = {
    "internvl3-1b": InternVL3(_VISION_300M, 896, 24, 14, 2, 4864),
    "internvl3-8b": InternVL3(_VISION_300M, 3584, 28, 28, 4, 18_944),
    "internvl3-38b": InternVL3(_VISION_6B, 5120, 64, 40, 8, 27_648),
    "internvl3-78b": InternVL3(_VISION_6B, 8192, 80, 64, 8, 29_568),
}


def preset_config(name: str) -> InternVLConfig:
    """transformers' configuration of a preset.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; choose from {', '.join(PRESETS)}")
    shape = PRESETS[name]
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**shape.vision),
        text_config=Qwen2Config(
            vocab_size=_VOCABULARY,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.mlp,
            max_position_embeddings=32_768,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
        image_token_id=_VOCABULARY - 1,
        tie_word_embeddings=False,
    )
