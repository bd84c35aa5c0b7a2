"""Data, from a JSON record to a batch.

    record -> Sample -> (shards + index) -> plan -> stream -> features -> Batch
    sample.py           shards.py           plan.py stream.py  encode.py   collate.py
                                                               image.py, stage_text.py

Names are imported at first use: preparing shards needs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coconut.data.collate import MultimodalCollator as MultimodalCollator
    from coconut.data.dataset import MultimodalDataset as MultimodalDataset
    from coconut.data.encode import SampleEncoder as SampleEncoder
    from coconut.data.image import ImageProcessor as ImageProcessor
    from coconut.data.plan import EpochPlan as EpochPlan
    from coconut.data.plan import make_plan as make_plan
    from coconut.data.sample import read_samples as read_samples
    from coconut.data.shards import ShardReader as ShardReader
    from coconut.data.shards import open_dataset as open_dataset
    from coconut.data.shards import write_shards as write_shards
    from coconut.data.stream import StreamLoader as StreamLoader

_HOME = {
    "MultimodalCollator": "collate",
    "MultimodalDataset": "dataset",
    "SampleEncoder": "encode",
    "ImageProcessor": "image",
    "EpochPlan": "plan",
    "make_plan": "plan",
    "read_samples": "sample",
    "ShardReader": "shards",
    "open_dataset": "shards",
    "write_shards": "shards",
    "StreamLoader": "stream",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
