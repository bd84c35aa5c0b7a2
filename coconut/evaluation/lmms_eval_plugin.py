"""What lmms-eval finds under the entry point group "lmms_eval.models": where our model class is, not yet the class."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """lmms-eval's `ModelManifest` of `--model coconut`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("coconut", simple_class_path="coconut.evaluation.lmms_eval_model.CoconutLmms")
