"""Bytes that ZeRO-3 gathers in a step, from DeepSpeed's comms logger, with K = 0 and with K changing every step.

Arguments: leaf or layers (whether the loop may hold the decoder). Rank 0 prints one JSON line.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from deepspeed.comm import comm

from coconut.model import MultimodalCoconut
from coconut.training.engine import start_engine
from coconut.utils.distributed import get_rank, init_distributed_training
from tests.model.reference import END, EOS, LATENT, START, batch_rows, make_row, tiny_internvl

WARM_UP, STEPS = 10, 20


def gathered_bytes() -> int:
    """All bytes of all-gathers so far: sizes and counts, by operation, as the logger keeps them."""
    total = 0
    for operation, sizes in comm.comms_logger.comms_dict.items():
        if "all_gather" in operation or "allgather" in operation:
            total += sum(size * values[0] for size, values in sizes.items())
    return total


def main(kind: str) -> None:
    init_distributed_training(force=True)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": json.loads(Path("ds_configs/zero3.json").read_text())["zero_optimization"],
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True},
    }
    # This model's matrices are below the default threshold, and would never be partitioned.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if kind == "layers":
        settings["zero_optimization"]["stage3_max_live_parameters"] = 5000
    figures = {}
    for name, most in (("k0", 0), ("changing", 6)):
        torch.manual_seed(0)
        model = MultimodalCoconut(tiny_internvl(), LATENT, START, END, EOS)
        engine = start_engine(model, settings)
        draw, generator = random.Random(0), torch.Generator().manual_seed(get_rank())
        start = 0
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                start = gathered_bytes()
            k = draw.randint(0, most)  # the same on both ranks; a rank's rows are ragged below it
            rows = [make_row(generator, max(0, k - i), 1) for i in range(3)]
            out = engine(**batch_rows(rows, dtype=torch.float32), loss_only=True, num_items_in_batch=10)
            engine.backward(out.loss)
            engine.step()
        figures[name] = (gathered_bytes() - start) / STEPS
        figures["weights"] = 4 * sum(parameter.ds_numel for parameter in model.parameters())
        engine.destroy()
    if get_rank() == 0:
        print(json.dumps({"kind": kind, **figures, "gathered_vs_k0": figures["changing"] / figures["k0"]}))


if __name__ == "__main__":
    main(sys.argv[1])
