"""What a run says of an epoch's plan before it begins: how even it is, against chance, and what it takes of each set.

Computed on the main process from plan and index, which every rank has; no rank is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from coconut.data.balance import measure_balance
from coconut.data.order import epoch_order
from coconut.data.plan import EpochPlan
from coconut.training.inputs import TrainingInputs


def plan_facts(inputs: TrainingInputs, plan: EpochPlan, stage: int, epoch: int, ranks: int) -> dict[str, Any]:
    """Facts of the epoch that `plan` is of.

    Returns:
        ``epoch_steps``; ``cost_mean``, ``cost_p95``, ``padding`` and ``samples_a_micro_batch`` (see `Balance`); the
        first three again of as many samples at random, as ``random_...``; ``sets``, of each training set's path the
        samples and tokens (image tokens included) that the epoch holds of it.
    """
    train, length = inputs.train, len(plan.order)
    assert train is not None
    parts = inputs.parts(stage)
    shuffled = epoch_order(parts, seed=inputs.config.seed, epoch=epoch, length=length)
    at_random = EpochPlan(shuffled, plan.costs, plan.slots, plan.n_steps, is_balanced=False)
    ours, chance = (asdict(measure_balance(one, train.tokens_N, train.tails_N, ranks)) for one in (plan, at_random))
    names = {first: path for path, first in train.reader.first.items()}
    sets = {}
    for part in parts:
        indices = plan.order[(plan.order >= part.first) & (plan.order < part.first + part.size)]
        sets[names[part.first]] = {"samples": len(indices), "tokens": int(train.tokens_N[indices].sum())}
    ours["samples_a_micro_batch"] = ours.pop("samples")
    del chance["samples"]
    return {
        "epoch_steps": len(plan),
        **ours,
        **{f"random_{name}": value for name, value in chance.items()},
        "sets": sets,
    }


def plan_lines(facts: dict[str, Any]) -> Iterator[str]:
    """The same for people to read."""
    yield (
        f"{facts['epoch_steps']:,} steps an epoch; costliest rank of a micro-step {facts['cost_mean']:.3f} times the "
        f"mean (p95 {facts['cost_p95']:.3f}), padding {facts['padding']:.1%}; "
        f"at random {facts['random_cost_mean']:.3f} ({facts['random_cost_p95']:.3f}), {facts['random_padding']:.1%}"
    )
    total = sum(one["samples"] for one in facts["sets"].values())
    for path, one in facts["sets"].items():
        share = one["samples"] / total
        yield f"{path}: {one['samples']:,} samples an epoch ({share:.1%}), about {one['tokens']:,} tokens"
