"""The one place that knows how transformers lays out a backbone: which module is what, and how images enter it.

Everything else in `coconut.model` talks to a `Backbone`. Adding one means a subclass and a line in `BACKBONES`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, InternVLForConditionalGeneration, PreTrainedModel

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

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.base_model.get_input_embeddings()(input_ids)

    def encode_images(self, pixels_PCHW: Tensor) -> Tensor:
        """Features [patches, tokens_per_patch, hidden] of normalised float tiles [patches, 3, H, W]."""
        raise ConfigError(
            f"{type(self.base_model).__name__} reads text only, but the batch has images; choose a vision-language "
            "model_id such as OpenGVLab/InternVL3-1B-hf, or data without images"
        )

    def position_ids(self, attention_mask_BL: Tensor) -> Tensor:
        """Positions [B, L] that count tokens and skip padding."""
        return (attention_mask_BL.long().cumsum(-1) - 1).clamp(min=0)


class InternVLBackbone(Backbone):
    """InternVL in transformers' own format (hub ids that end in ``-hf``)."""

    auto_class: ClassVar[Any] = InternVLForConditionalGeneration

    def __init__(self, base_model: PreTrainedModel) -> None:
        super().__init__(base_model)
        config = base_model.config
        vision = config.vision_config
        self.image_token_id = config.image_token_id
        self.tile_size = int(_first(vision.image_size))
        grid = self.tile_size // int(_first(vision.patch_size))
        self.tokens_per_patch = int((grid * config.downsample_ratio) ** 2)

    @property
    def decoder(self) -> nn.Module:
        return self.base_model.model.language_model

    @property
    def vision_layers(self) -> nn.ModuleList:
        return self.base_model.model.vision_tower.encoder.layer

    def encode_images(self, pixels_PCHW: Tensor) -> Tensor:
        return self.base_model.model.get_image_features(pixel_values=pixels_PCHW, return_dict=True).pooler_output


#: model_type of a transformers configuration -> adapter; anything else is tried as a text-only causal model.
BACKBONES: dict[str, type[Backbone]] = {"internvl": InternVLBackbone}


def backbone_class(model_type: str) -> type[Backbone]:
    """The adapter for a transformers ``model_type``.

    Raises:
        ConfigError: a vision-language family that no adapter is written for.
    """
    if model_type == "internvl_chat":
        raise ConfigError(
            "this checkpoint is in InternVL's original format (model_type 'internvl_chat'), which needs remote code; "
            "use the same weights in transformers' format, whose hub id ends in '-hf' (OpenGVLab/InternVL3-1B-hf)"
        )
    return BACKBONES.get(model_type, Backbone)


def wrap_backbone(base_model: PreTrainedModel) -> Backbone:
    return backbone_class(base_model.config.model_type)(base_model)


def _first(size: int | list[int] | tuple[int, ...]) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size


def normalise_pixels(pixels_PCHW: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 tiles are scaled to [0, 1] and normalised; float tiles are taken as normalised already."""
    if pixels_PCHW.dtype == torch.uint8:
        pixels_PCHW = (pixels_PCHW.to(dtype) / 255 - mean.to(dtype)) / std.to(dtype)
    return pixels_PCHW.to(dtype)
