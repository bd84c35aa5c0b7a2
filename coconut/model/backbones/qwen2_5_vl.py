"""Qwen2.5-VL, each image tile as one image of a fixed size; positions have three axes (time, row, column).

Shapes: B rows, L columns, P tiles, g image tokens along a tile's side, m patches merged along an image token's side.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration

from coconut.model.backbones.base import Backbone, without

#: Side of a tile in pixels: a multiple of patch x merge (28) that keeps InternVL's 256 tokens a tile.
TILE_SIZE = 448


class Qwen25VLBackbone(Backbone):
    """The native aspect ratio of an image is not supported: every tile is `tile_size` pixels square."""

    counts_positions = False  # an image takes fewer than it has tokens

    auto_class: ClassVar[Any] = Qwen2_5_VLForConditionalGeneration
    pixel_mean: ClassVar[tuple[float, ...]] = (0.48145466, 0.4578275, 0.40821073)  # of CLIP
    pixel_std: ClassVar[tuple[float, ...]] = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, base_model: PreTrainedModel) -> None:
        super().__init__(base_model)
        config = base_model.config
        vision = config.vision_config
        self.image_token_id = config.image_token_id
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.tile_size = getattr(config, "tile_size", TILE_SIZE)
        self.side = self.tile_size // (self.patch * self.merge)
        self.tokens_per_patch = self.side**2

    @property
    def decoder(self) -> nn.Module:
        return self.base_model.model.language_model

    @property
    def vision_layers(self) -> nn.ModuleList:
        return self.base_model.model.visual.blocks

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The projector is the merger, which transformers keeps inside the vision tower."""
        projector = list(self.base_model.model.visual.merger.parameters())
        vision = without(list(self.base_model.model.visual.parameters()), projector)
        return {"vision": vision, "projector": projector, **super().parts}

    def encode_images(self, pixels_PCHW: Tensor) -> Tensor:
        """Each still image is `frames` equal frames; patches are ordered merge block by merge block."""
        tiles, channels = pixels_PCHW.shape[:2]
        g, m, p = self.side, self.merge, self.patch
        blocks = pixels_PCHW.reshape(tiles, 1, channels, g, m, p, g, m, p).expand(-1, self.frames, *[-1] * 7)
        patches = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(tiles * (g * m) ** 2, -1)
        grid_P3 = torch.tensor([[1, g * m, g * m]], device=patches.device).expand(tiles, 3)
        features = self.base_model.model.visual(patches, grid_thw=grid_P3).pooler_output
        return features.reshape(tiles, self.tokens_per_patch, -1)

    def position_ids(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
        """[3, B, L]: text counts on all axes; a tile's tokens share their start and add row and column to it.

        Text goes on g positions after a tile's start, as its rows and columns have used up g.
        """
        real_BL = attention_mask_BL.bool()
        image_BL = (input_ids_BL == self.image_token_id) & real_BL
        within_BL = (image_BL.long().cumsum(-1) - 1) % self.tokens_per_patch
        is_last_BL = within_BL == self.tokens_per_patch - 1
        step_BL = torch.where(image_BL, is_last_BL.long() * self.side, real_BL.long())
        start_BL = step_BL.cumsum(-1) - step_BL
        row_BL = torch.where(image_BL, within_BL // self.side, 0)
        column_BL = torch.where(image_BL, within_BL % self.side, 0)
        return torch.stack([start_BL, start_BL + row_BL, start_BL + column_BL])

    def prepare_decoding(self, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> None:
        """Tell transformers how far positions lag behind the count of tokens, as it does after its own prefill."""
        last_B = self.position_ids(input_ids_BL, attention_mask_BL)[0, :, -1]
        self.base_model.model.rope_deltas = (last_B + 1 - attention_mask_BL.sum(-1))[:, None]
