"""Loads an original-format InternVL partitioned under ZeRO-3: the weights equal one process's, and memory stays small.

Arguments: folder, most bytes a rank may add beyond its partition while loading. Ends with "all equal".
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from deepspeed import zero
from safetensors import safe_open
from transformers.integrations import HfDeepSpeedConfig

from coconut.model import MultimodalCoconut
from coconut.model.backbones.original_internvl import original_name, shards_of
from coconut.utils.distributed import get_rank, init_distributed_training, shutdown_distributed
from tests.distributed.parity_worker import REALLY_PARTITIONED


def main(folder: Path, most_bytes: int) -> None:
    init_distributed_training(force=True)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, **REALLY_PARTITIONED},
    }
    keep_alive = HfDeepSpeedConfig(settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = MultimodalCoconut.from_pretrained(folder)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    partition = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters())
    added -= partition  # on a GPU it would not lie in host memory
    assert keep_alive.is_zero3()
    shards = shards_of(str(folder))
    checked = 0
    for name, parameter in model.base_model.named_parameters():
        assert parameter.numel() == 0, f"{name} is not partitioned"
        key, part = original_name(name)
        with safe_open(shards[key], framework="pt") as file, zero.GatheredParameters(parameter):
            expected = file.get_tensor(key)
            expected = expected if part is None else expected.chunk(3)[part]
            assert torch.equal(parameter.detach(), expected), name
        checked += 1
    assert added < most_bytes, f"rank {get_rank()} added {added} bytes of host memory, more than {most_bytes}"
    sizes = f"{added / 2**20:.0f} MiB added, beyond a partition of {partition / 2**20:.0f} MiB"
    print(f"rank {get_rank()}: {checked} weights all equal, {sizes}")
    shutdown_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
