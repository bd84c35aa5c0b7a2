"""Named starting points, as differences from the schema's defaults. The files of ``args/`` add models and data."""

from __future__ import annotations

from typing import Any

TEMPLATES: dict[str, dict[str, Any]] = {
    "default": {},
    "cot": {"name": "multimodal_cot", "method": "cot", "num_epochs": 10, "uniform_prob": 0.0},
    "coconut": {"name": "multimodal_coconut", "method": "coconut"},
    "eval": {"name": "multimodal_eval", "only_eval": True},
    "debug": {
        "name": "multimodal_debug",
        "debug": True,
        "epochs_per_stage": 1,
        "num_epochs": 5,
        "warmup_steps": 2,
        "batch_size_training": 2,
        "batch_size_eval": 2,
        "max_num_patches": 2,
        "num_workers": 0,
        "max_new_tokens": 32,
        "log_every_n_steps": 1,
    },
}
