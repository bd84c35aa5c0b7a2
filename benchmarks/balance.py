"""How evenly the plan spreads cost over ranks, against the same samples at random.

    python benchmarks/balance.py [--json FILE] [--samples 100000] [--plan 10000000]

Sizes (stated, not measured): 90 % of the samples have an image of one of ten usual formats, each side varied by some
12 %, cut by InternVL's rule into 1 to 13 tiles of 256 tokens; questions lognormal (median 49 tokens, sigma 0.6), steps
and answer lognormal (median 74, sigma 0.7). Cost: tokens, image tokens included. Four micro-batches an optimizer step.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coconut.data.image import ImageProcessor
from coconut.data.plan import EpochPlan, make_plan

FORMATS = (  # width, height, share
    (640, 480, 22), (480, 640, 8), (640, 427, 14), (500, 375, 10), (375, 500, 4),
    (800, 800, 6), (1024, 1024, 2), (1700, 2200, 8), (850, 600, 10), (1920, 1080, 6),
)  # fmt: skip
ACCUMULATION = 4
SETTINGS = {"8x4": (8, 4), "64x1": (64, 1)}  # ranks, samples of a micro-batch; 1: a budget of the costliest sample


def draw_sizes(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts and of what follows them, [n] each."""
    rng = np.random.default_rng(seed)
    shares = np.array([share for *_, share in FORMATS]) / sum(share for *_, share in FORMATS)
    sides = np.array([size[:2] for size in FORMATS])[rng.choice(len(FORMATS), size=n, p=shares)]
    sides = np.round(sides * np.exp(rng.normal(0, 0.12, (n, 2))) / 4).astype(int) * 4
    rule = ImageProcessor(448, 12).num_patches
    sizes, which = np.unique(sides, axis=0, return_inverse=True)
    patches = np.array([rule(int(w), int(h)) for w, h in sizes])[which.reshape(-1)] * (rng.random(n) >= 0.1)
    prompts = 256 * patches + 20 + np.minimum(rng.lognormal(3.9, 0.6, n), 1000).astype(int)
    return prompts.astype(float), 5.0 + np.minimum(rng.lognormal(4.3, 0.7, n), 2000).astype(int)


def measure(plan: EpochPlan, prompts: np.ndarray, tails: np.ndarray, ranks: int) -> dict[str, float]:
    """Max/mean cost of the micro-batches that run together; share of padding, rows aligned after the prompt; variance
    of a step's mean length, as a multiple of a full shuffle's."""
    costs = prompts + tails
    means = np.array([costs[plan.samples(step)].mean() for step in range(len(plan))])
    shuffled = costs.var() * len(plan) / len(plan.order)  # of steps of a full shuffle
    ratios, real, padded, empty, rows = [], 0.0, 0.0, 0, 0
    for step in range(len(plan)):
        slots = plan.step(step)
        cost = np.array([costs[slot].sum() for slot in slots]).reshape(-1, ranks)
        ratios += (cost.max(axis=1) / cost.mean(axis=1)).tolist()
        for slot in slots:
            rows, empty = rows + len(slot), empty + (not len(slot))
            if len(slot):
                real += costs[slot].sum()
                padded += len(slot) * (prompts[slot].max() + tails[slot].max())
    n_slots = len(plan) * plan.slots
    return {
        "cost_mean": float(np.mean(ratios)),
        "cost_p95": float(np.quantile(ratios, 0.95)),
        "padding": 1 - real / padded,
        "samples": rows / n_slots,
        "empty": empty / n_slots,
        "length_variance": float(means.var() / shuffled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--plan", type=int, default=0, help="also time the planning of so many samples")
    args = parser.parse_args()
    prompts, tails = draw_sizes(args.samples)
    costs = prompts + tails
    results: dict[str, dict] = {}
    for name, (ranks, micro_batch) in SETTINGS.items():
        slots = ranks * ACCUMULATION
        common = {"seed": 0, "epoch": 0, "slots": slots, "group": ranks, "lengths": (prompts, tails)}
        ours = measure(
            make_plan(costs, **common, samples_per_step=slots * micro_batch, balance="cost"), prompts, tails, ranks
        )
        samples = round(slots * ours["samples"])  # as many at random, in the same number of slots
        random = measure(make_plan(costs, **common, samples_per_step=samples, balance="none"), prompts, tails, ranks)
        results[name] = {**ours, "random": random}
        for kind, row in (("balanced", ours), ("random", random)):
            print(f"{name:5s} {kind:9s}", "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
    if args.plan:
        repeats = -(-args.plan // args.samples)
        many = [np.tile(values, repeats)[: args.plan] for values in (prompts, tails)]
        begin = time.perf_counter()
        plan = make_plan(
            many[0] + many[1],
            seed=0,
            epoch=0,
            slots=32,
            samples_per_step=128,
            balance="cost",
            group=8,
            lengths=tuple(many),
        )
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
        results["plan"] = {"samples": args.plan, "seconds": seconds, "peak_GB": peak, "steps": len(plan)}
        print(f"planned {args.plan:,} samples in {seconds:.1f} s, {len(plan):,} steps, peak memory {peak:.2f} GB")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
