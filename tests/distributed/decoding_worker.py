"""Two ranks train, look at validation data as a run does, and train on; one rank's answers are longer than the other's.

Argument: "whole" (ZeRO-3 holds the decoder while it decodes) or "layers". Ends with "answers equal".
"""

from __future__ import annotations

import sys

import torch

from coconut.training.engine import start_engine
from coconut.utils.distributed import get_rank, init_distributed_training
from tests.distributed.parity_worker import build, zero_settings
from tests.model.reference import END, batch_rows, make_row

BATCHES = 4  # the third is the first whose calls DeepSpeed compares with those that it has recorded


def main(how: str) -> None:
    init_distributed_training(force=True)
    special = {"layers"} if how == "layers" else set()
    alone = build(set()).eval()
    model = build(special)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero_settings(3, special),
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_allow_untested_optimizer": True,
    }
    engine = start_engine(model, settings)
    assert model.loop.is_leaf == (how == "whole")
    row = make_row(torch.Generator().manual_seed(0), 2, 1)
    batch = batch_rows([row], dtype=torch.float32)
    n = row["ids"].index(END) + 1
    prompt = {**batch, "input_ids": batch["input_ids"][:, :n], "attention_mask": batch["attention_mask"][:, :n]}
    del prompt["labels"]
    options = {"wrap_prompt": False, "do_sample": False, "max_new_tokens": 7 if get_rank() else 2}

    def step() -> None:
        engine.backward(engine(**batch, loss_only=True, num_items_in_batch=1).loss)
        engine.step()

    for _ in range(3):
        step()
    engine.eval()
    for _ in range(BATCHES):
        with torch.no_grad():
            model(**batch, loss_only=True, num_items_in_batch=1.0)
        assert torch.equal(model.generate(**prompt, **options), alone.generate(**prompt, **options))
    engine.train()
    step()
    print("answers equal")


if __name__ == "__main__":
    main(sys.argv[1])
