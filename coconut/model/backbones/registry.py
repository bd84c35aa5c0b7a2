"""model_type of a transformers configuration -> adapter; anything else is tried as a text-only causal model."""

from __future__ import annotations

from transformers import PreTrainedModel

from coconut.model.backbones.base import Backbone
from coconut.model.backbones.internvl import InternVLBackbone
from coconut.model.backbones.qwen2_5_vl import Qwen25VLBackbone

BACKBONES: dict[str, type[Backbone]] = {"internvl": InternVLBackbone, "qwen2_5_vl": Qwen25VLBackbone}


def backbone_class(model_type: str) -> type[Backbone]:
    """The adapter for a transformers ``model_type``."""
    return BACKBONES.get(model_type, Backbone)


def wrap_backbone(base_model: PreTrainedModel) -> Backbone:
    return backbone_class(base_model.config.model_type)(base_model)
