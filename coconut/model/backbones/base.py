"""What the rest of `coconut.model` asks of a backbone, and the answers of a text-only causal language model.

A family with images is a subclass in a file of its own, and a line in `registry.py` (docs/backbones.md).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from coconut.types import ConfigError

#: Channel means and deviations that InternVL's pixels are normalised with (those of ImageNet).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone:
    """A text-only causal language model (GPT-2, Llama, Qwen, Mistral ...); subclasses add images.

    Attributes:
        base_model: the transformers model with its language head.
        image_token_id: id of the placeholder that image features replace; None without images.
        tokens_per_patch: placeholders one image tile takes.
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    #: Whether positions count tokens, so that those after a cache need no look at what is cached.
    counts_positions: ClassVar[bool] = True
    pixel_mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    pixel_std: ClassVar[tuple[float, ...]] = IMAGENET_STD

    def __init__(self, base_model: PreTrainedModel) -> None:
        self.base_model = base_model
        self.image_token_id: int | None = None
        self.tokens_per_patch = 0
        self.tile_size = 0  # height and width of an image tile in pixels

    @property
    def text_config(self) -> Any:
        return self.base_model.config.get_text_config(decoder=True)

    @property
    def decoder(self) -> nn.Module:
        """Maps embeddings to hidden states after the final norm."""
        return self.base_model.get_decoder()

    @property
    def decoder_layers(self) -> nn.ModuleList:
        for name in ("layers", "h", "blocks"):
            layers = getattr(self.decoder, name, None)
            if isinstance(layers, nn.ModuleList):
                return layers
        raise ConfigError(f"cannot find the layers of {type(self.decoder).__name__}; name them in a Backbone subclass")

    @property
    def head(self) -> nn.Module:
        return self.base_model.get_output_embeddings()

    @property
    def vision_layers(self) -> nn.ModuleList:
        """Layers of the vision tower, none for a text-only model."""
        return nn.ModuleList()

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of hidden states [..., H], scaled and capped as the family does it: [..., V]."""
        config, logits = self.text_config, self.head(hidden)
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """What may be frozen, by name (docs/tuning.md): language is the decoder without its token embeddings."""
        embeddings = _parameters(self.base_model.get_input_embeddings(), self.head)
        return {"language": without(_parameters(self.decoder), embeddings), "embeddings": embeddings}

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.base_model.get_input_embeddings()(input_ids)

    def encode_images(self, pixels_PCHW: Tensor) -> Tensor:
        """Features [patches, tokens_per_patch, hidden] of normalised float tiles [patches, 3, H, W]."""
        raise ConfigError(
            f"{type(self.base_model).__name__} reads text only, but the batch has images; choose a vision-language "
            "model_id such as OpenGVLab/InternVL3-1B-hf, or data without images"
        )

    def position_ids(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """Positions [B, L], or [axes, B, L], that count tokens and skip padding."""
        return (attention_mask_BL.long().cumsum(-1) - 1).clamp(min=0)

    def prepare_decoding(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> None:
        """Called before transformers' own decoding goes on from a filled cache; nothing to do where positions count."""


def _parameters(*modules: nn.Module) -> list[nn.Parameter]:
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def without(parameters: list[nn.Parameter], others: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that are none of the others."""
    known = {id(parameter) for parameter in others}
    return [parameter for parameter in parameters if id(parameter) not in known]


def normalise_pixels(pixels_PCHW: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 tiles are scaled to [0, 1] and normalised; float tiles are taken as normalised already."""
    if pixels_PCHW.dtype == torch.uint8:
        pixels_PCHW = (pixels_PCHW.to(dtype) / 255 - mean.to(dtype)) / std.to(dtype)
    return pixels_PCHW.to(dtype)


def first(size: int | list[int] | tuple[int, ...]) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size
