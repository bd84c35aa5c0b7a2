"""Two ranks with unequal rows under ZeRO: gradients and updated weights equal one process that sees all rows.

Arguments: ZeRO stage, number of situations, seed, and what is special, separated by commas: checkpointed; layers (the
decoder is gathered layer by layer); frozen (the vision tower); language (the decoder and its embeddings frozen); lora;
offload; normed, projector, jacobi; or a fault to make (cut-thoughts, cut-cache). Prints one line a situation; ends with
"all equal", or, with a fault, with "fault seen".
"""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from coconut.model import MultimodalCoconut, pass_cache
from coconut.model.adapters import LoraSettings, choose_trained
from coconut.model.feedback import ProjectorFeedback
from coconut.training.engine import start_engine
from coconut.utils.distributed import all_reduce_sum, get_rank, get_world_size, init_distributed_training
from tests.model.reference import END, EOS, LATENT, START, batch_rows, make_row, tiny_internvl

# Without these a model this small is never partitioned, and the test would test nothing.
REALLY_PARTITIONED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 2000,
    "stage3_max_live_parameters": 5000,
    "stage3_max_reuse_distance": 0,
}
#: Whether ZeRO-3 may hold the decoder whole (the loop is a leaf), or has to gather it layer by layer.
LAYERS_FIT = {False: {"stage3_max_live_parameters": 10**9}, True: {}}
LEARNING_RATE = 1e-2
INERT = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "labels": torch.full((1, 1), -100)}


def situation(seed: int) -> list[list[dict]]:
    """Rows of each rank: ragged latents, perhaps none, perhaps in two spans with text between them, several images or
    none, perhaps no row at all."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ranks = []
    for _ in range(get_world_size()):
        most, images = draw.choice([0, 1, 3, 5]), draw.choice([0, 1, 2])
        rows = [
            make_row(generator, draw.randint(0, most), draw.randint(0, images), draw.randint(2, 12), draw.randint(0, 6))
            for _ in range(draw.choice([0, 1, 2, 4]))
        ]
        if draw.random() < 0.3:
            rows = [joined(row, make_row(generator, draw.randint(0, most), 0, 2, 3)) for row in rows]
        ranks.append(rows)
    if not any(ranks):
        ranks[-1] = [make_row(generator, 2, 1)]
    return ranks


def joined(first: dict, second: dict) -> dict:
    """One row of two."""
    row = {key: first[key] + second[key] for key in ("ids", "labels")}
    return row | {"tiles": torch.cat([first["tiles"], second["tiles"]])}


def build(special: set[str]) -> MultimodalCoconut:
    torch.manual_seed(7)
    model = MultimodalCoconut(tiny_internvl(), LATENT, START, END, EOS)
    for name in special & {"normed", "projector"}:
        model.set_latent_feedback(name)
    if isinstance(model.loop.feedback, ProjectorFeedback):
        torch.nn.init.normal_(model.loop.feedback.down.weight, std=0.05)  # else its inner weights have no gradient
    if "jacobi" in special:
        model.set_latent_passes(2)
    freeze = {"frozen": ["vision"], "language": ["language", "embeddings"]}
    named = [part for name in freeze if name in special for part in freeze[name]]
    choose_trained(model, named, LoraSettings(rank=4, alpha=8.0) if "lora" in special else None, seed=7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # else A has no gradient
    return model


def tensors_of(rows: list[dict]) -> dict:
    aligned = len(rows) % 2 == 0  # else their first latents stand in different columns
    return batch_rows(rows, aligned, dtype=torch.float32) if rows else dict(INERT)


@contextmanager
def sabotage(special: set[str]):
    """Cut the gradient where public code cuts it: through the thoughts, or through the cache."""
    update = pass_cache._PassLayer.update

    def detached(self, keys, values, *args, **kwargs):
        self.columns.parts[:] = [(k.detach(), v.detach()) for k, v in self.columns.parts]
        return update(self, keys, values, *args, **kwargs)

    with ExitStack() as faults:
        if "cut-cache" in special:
            faults.enter_context(mock.patch.object(pass_cache._PassLayer, "update", detached))
        yield {"thought_transform": lambda thought, k: thought.detach()} if "cut-thoughts" in special else {}


def zero_settings(stage: int, special: set[str]) -> dict:
    settings = {"stage": stage}
    if stage == 3:
        settings |= REALLY_PARTITIONED
        if "layers" not in special:  # the loop may hold the decoder whole
            settings["stage3_max_live_parameters"] = 10**9
    if "offload" in special:
        settings |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return settings


def main(stage: int, situations: int, seed: int, special: set[str]) -> None:
    init_distributed_training(force=True)
    model, reference = build(special), build(special)
    if "checkpointed" in special:
        model.gradient_checkpointing_enable()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero_settings(stage, special),
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = start_engine(model, settings)
    assert model.loop.is_leaf == (stage == 3 and "layers" not in special)
    is_faulty = bool(special & {"cut-thoughts", "cut-cache"})
    released, worst = 0, 0.0
    for number in range(situations):
        ranks = situation(seed + number)
        mine = ranks[get_rank()]
        labels = sum(token != -100 for rows in ranks for row in rows for token in row["labels"][1:])
        with sabotage(special) as extra:
            out = engine(
                **tensors_of(mine), loss_only=True, num_items_in_batch=max(labels, 1) / get_world_size(), **extra
            )
        if stage == 3:
            released += sum(p.numel() == 0 for p in model.parameters())
        engine.backward(out.loss, scale_wrt_gas=False)

        reference.zero_grad()
        everything = [row for rows in ranks for row in rows]
        theirs = reference(**tensors_of(everything), loss_only=True, num_items_in_batch=max(labels, 1)).loss
        theirs.backward()
        loss = all_reduce_sum([float(out.loss.detach())])[0] / get_world_size()
        assert is_faulty or abs(loss - float(theirs.detach())) < 1e-5 * max(1.0, abs(loss)), (number, loss, theirs)
        norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
        for (name, ours), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            if not ours.requires_grad:
                continue
            gradient = safe_get_full_grad(ours)
            expected = torch.zeros_like(gradient) if other.grad is None else other.grad
            error = float((gradient - expected).norm() / norm)
            assert error < 1e-5 or is_faulty, (number, name, error, float(norm))
            worst = max(worst, error)
        engine.step()
        with torch.no_grad():
            for other in reference.parameters():
                if other.grad is not None:
                    other -= LEARNING_RATE * other.grad
        if get_rank() == 0:
            print(
                f"situation {number}: rows {[len(rows) for rows in ranks]} labels {labels} gradient error {worst:.1e}"
            )
    if is_faulty:
        assert worst > 1e-3, f"the fault {special} went unnoticed: largest gradient error {worst:.1e}"
        print(f"fault seen: {special}, gradient error {worst:.1e}")
        return
    for (name, ours), other in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if ours.requires_grad:
            assert torch.allclose(safe_get_full_fp32_param(ours), other[1], rtol=1e-4, atol=1e-5), name
    if stage == 3:
        assert released > 0, "no parameter was ever released: this run tested nothing"
    if get_rank() == 0:
        print(f"all equal: stage {stage}, {situations} situations, {released} parameters seen released")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), set(sys.argv[4].split(",")))
