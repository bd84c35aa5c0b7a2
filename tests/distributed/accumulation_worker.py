"""One optimizer step over four rows, as one micro-batch or as four: prints gradient norm (1 where the engine does not
tell, which is without ZeRO), sum of the squared weights, and loss.

Arguments: ZeRO stage, micro-batches.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.utils import safe_get_full_fp32_param

from coconut.training.engine import start_engine
from coconut.training.step import StepPlan, take_step
from coconut.training.watchdog import Watchdog
from coconut.types import Batch
from coconut.utils.distributed import init_distributed_training
from tests.distributed.parity_worker import build, zero_settings
from tests.model.reference import batch_rows, make_row


def main(stage: int, accumulation: int) -> None:
    init_distributed_training(force=True)
    model = build(set())
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 3.0,  # less than the norm, and more than a quarter of it
        "zero_optimization": zero_settings(stage, set()),
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_allow_untested_optimizer": True,
    }
    engine = start_engine(model, settings)
    generator = torch.Generator().manual_seed(0)
    rows = [make_row(generator, k, 1, 4, 3 + k) for k in range(4)]
    cut = [rows[number::accumulation] for number in range(accumulation)]
    batches = [
        Batch(batch_rows(some, dtype=torch.float32), tuple("row" for _ in some), n_label_tokens=0) for some in cut
    ]
    labels = sum(sum(label != -100 for label in row["labels"]) for row in rows)
    nothing = dict.fromkeys(("tokens", "patches", "bad_samples", "new_bad_samples", "written"), 0)
    plan = StepPlan(batches=accumulation, label_tokens=labels, samples=4, stop_reason=None, **nothing)
    config = SimpleNamespace(fp16=False)
    with Watchdog(None, Path()) as watchdog:
        result = take_step(engine, model, batches, plan, judge=lambda _: None, watchdog=watchdog, config=config)
    assert result.fault is None
    # Without ZeRO DeepSpeed keeps no other copy of a weight.
    values = [safe_get_full_fp32_param(p) if stage else p.detach() for p in model.parameters()]
    weights = sum(float(value.double().square().sum()) for value in values)
    norm = engine.get_global_grad_norm()
    print(f"NORM {1.0 if norm is None else float(norm):.6e} WEIGHTS {weights:.8e} LOSS {result.loss:.6e}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
