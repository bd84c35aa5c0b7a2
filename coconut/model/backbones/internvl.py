"""InternVL in transformers' own format (hub ids that end in ``-hf``)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration, PreTrainedModel

from coconut.model.backbones.base import Backbone, first


class InternVLBackbone(Backbone):
    auto_class: ClassVar[Any] = InternVLForConditionalGeneration

    def __init__(self, base_model: PreTrainedModel) -> None:
        super().__init__(base_model)
        config = base_model.config
        vision = config.vision_config
        self.image_token_id = config.image_token_id
        self.tile_size = int(first(vision.image_size))
        grid = self.tile_size // int(first(vision.patch_size))
        self.tokens_per_patch = int((grid * config.downsample_ratio) ** 2)

    @property
    def decoder(self) -> nn.Module:
        return self.base_model.model.language_model

    @property
    def vision_layers(self) -> nn.ModuleList:
        return self.base_model.model.vision_tower.encoder.layer

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        inner = self.base_model.model
        images = {"vision": inner.vision_tower, "projector": inner.multi_modal_projector}
        return {name: list(module.parameters()) for name, module in images.items()} | super().parts

    def encode_images(self, pixels_PCHW: Tensor) -> Tensor:
        return self.base_model.model.get_image_features(pixel_values=pixels_PCHW, return_dict=True).pooler_output
