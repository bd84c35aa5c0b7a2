"""Ranks under some ZeRO stage that go on from each other's pieces.

Arguments: folder, then moves such as write:2 (train under ZeRO-2, write), read:3 (read under ZeRO-3, go on) and
drop:1 (as write, but drop two updates in place of writing).
Every rank sees the same data, so that the number of ranks changes nothing but rounding. Prints the losses as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from coconut.training.anomalies import guarded_update
from coconut.training.engine import reset_optimizer
from coconut.training.pieces import copy_pieces, engine_numbers, local_bytes, pieces, read_pieces
from coconut.utils.distributed import all_gather_object, barrier, get_rank, init_distributed_training
from tests.distributed.parity_worker import REALLY_PARTITIONED


class Net(torch.nn.Module):
    """Odd sizes, a frozen layer, and a buffer that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 7)
        self.frozen = torch.nn.Linear(7, 7)
        self.frozen.requires_grad_(False)
        self.last = torch.nn.Linear(7, 3, bias=False)
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
        x = x.to(self.first.weight.dtype)
        return self.last(self.frozen(self.first(x)).tanh()).float().square().mean()


def build(stage: int, dtype: str, seed: int) -> Any:
    torch.manual_seed(seed)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **(REALLY_PARTITIONED if stage == 3 else {})},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "bf16": {"enabled": dtype == "bf16"},
    }
    model = Net()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=trained)
    reset_optimizer(engine)
    return engine


def step(engine: Any, number: int) -> float:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
    loss = engine(x)
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def snapshot(engine: Any) -> dict[str, torch.Tensor]:
    """Weights, moments and step counts, all but the buffer that counts forward passes."""
    found = {}
    for piece in pieces(engine):
        tensors = {"weight": piece.weight, **piece.moments()}
        found |= {f"{kind}/{piece.name}": value.clone() for kind, value in tensors.items() if piece.name != "steps"}
        found |= {f"{kind}/{piece.name}": torch.tensor(number) for kind, number in piece.scalars().items()}
    return found


def dropped(engine: Any, poison: float) -> None:
    """A step whose update is dropped: told to, or because its gradients are not finite."""
    loss = engine(torch.full((4, 5), 7.0)) * poison
    engine.backward(loss)
    with guarded_update(engine, drop=poison == 1.0):
        engine.step()


def main(folder: Path, dtype: str, moves: list[str]) -> None:
    init_distributed_training(force=True)
    losses: dict[str, list[float]] = {}
    for move in moves:
        action, stage = move.split(":")
        engine = build(int(stage), dtype, seed=2 if action == "read" else 1)
        if action == "write":
            losses[move] = [step(engine, number) for number in range(3)]
            if get_rank() == 0:
                folder.mkdir()
            barrier()
            path = copy_pieces(engine).write(folder)
            assert 0 <= path.stat().st_size - local_bytes(engine) < 4000
            if get_rank() == 0:
                (folder / "numbers.json").write_text(json.dumps(engine_numbers(engine)))
            barrier()
        elif action == "drop":
            losses[move] = [step(engine, number) for number in range(3)]
            before = snapshot(engine)
            for poison in (1.0, float("nan")):
                dropped(engine, poison)
                assert not engine.was_step_applied()
                assert all(torch.equal(before[name], value) for name, value in snapshot(engine).items())
        else:
            read_pieces(engine, folder, json.loads((folder / "numbers.json").read_text()))
            assert engine_numbers(engine) == json.loads((folder / "numbers.json").read_text())
            losses[move] = []
        losses[move] += [step(engine, number) for number in (3, 4, 5)]
        assert len({str(found) for found in all_gather_object(losses[move])}) == 1
    if get_rank() == 0:
        print("LOSSES", json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
