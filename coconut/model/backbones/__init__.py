"""Adapters: which module of a transformers model is what, and how images and positions enter it."""

from coconut.model.backbones.base import Backbone, normalise_pixels
from coconut.model.backbones.registry import BACKBONES, backbone_class, wrap_backbone

__all__ = ["BACKBONES", "Backbone", "backbone_class", "normalise_pixels", "wrap_backbone"]
