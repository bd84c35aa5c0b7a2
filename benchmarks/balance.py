"""How evenly the plan spreads cost over ranks, against the same samples at random.

    python benchmarks/balance.py [--json FILE] [--samples 100000] [--plan 10000000]

Sizes (stated, not measured): 90 % of the samples have an image of one of ten usual formats, each side varied by some
12 %, cut by InternVL's rule into 1 to 13 tiles of 256 tokens; questions lognormal (median 49 tokens, sigma 0.6), steps
and answer lognormal (median 74, sigma 0.7). Cost: tokens, image tokens included. Drawn with a fixed seed.

Settings are ranks x samples of a micro-batch, four micro-batches of each rank an optimizer step; "/1": one. At random
means as many samples a step, shuffled, in equal numbers a micro-batch.

    cost_mean, cost_p95  the costliest micro-batch of those that run together over their mean
    padded_mean          the same, padding included
    padding              share of padding in rows that are aligned where the prompt ends
    peak                 the largest micro-batch, padding included, over the mean
    samples, empty       samples of a micro-batch; share of micro-batches without one
    label_variance       variance of a label's share of a step over a full shuffle's, p (1 - p) / samples of a step: of
                         16 labels on data sorted by label that say nothing of length, on average
    length_label_variance, length_label_worst  the same where labels are tenths of the data by length; the worst of them
    length_variance      variance of a step's mean length over a full shuffle's
    correlation          between a label's share of a step and its mean length, of the 16 labels, root mean square; it
                         is 1 / sqrt(steps) where there is none (`chance`)
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
# Ranks, samples of a micro-batch (1: a budget of the costliest sample), micro-batches of a rank a step.
SETTINGS = {
    "8x4": (8, 4, 4), "64x1": (64, 1, 4), "1x4": (1, 4, 4), "8x4/1": (8, 4, 1), "1x8/2": (1, 8, 2), "1x4/1": (1, 4, 1),
}  # fmt: skip
N_LABELS = 16


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
    """The figures of the docstring above."""
    return _micro_batches(plan, prompts, tails, ranks) | _composition(plan, prompts + tails)


def _micro_batches(plan: EpochPlan, prompts: np.ndarray, tails: np.ndarray, ranks: int) -> dict[str, float]:
    slots = [slot for step in range(len(plan)) for slot in plan.step(step)]
    real = np.array([(prompts[slot] + tails[slot]).sum() for slot in slots])
    padded = np.array([len(slot) * (prompts[slot].max() + tails[slot].max()) if len(slot) else 0.0 for slot in slots])
    ratios, padded_ratios = (
        costs.reshape(-1, ranks).max(axis=1) / costs.reshape(-1, ranks).mean(axis=1) for costs in (real, padded)
    )
    counts = np.array([len(slot) for slot in slots])
    return {
        "cost_mean": float(ratios.mean()),
        "cost_p95": float(np.quantile(ratios, 0.95)),
        "padded_mean": float(padded_ratios.mean()),
        "padding": float(1 - real.sum() / padded.sum()),
        "peak": float(padded.max() / padded.mean()),
        "samples": float(counts.mean()),
        "empty": float((counts == 0).mean()),
    }


def _composition(plan: EpochPlan, lengths: np.ndarray) -> dict[str, float]:
    steps = [plan.samples(step) for step in range(len(plan))]
    per_step = len(plan.order) / len(plan)
    means = np.array([lengths[step].mean() for step in steps])

    def shares(labels: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the labels in each step, [steps, labels], and their variance over a shuffle's."""
        of_steps = np.array([np.bincount(labels[step], minlength=n_labels) / len(step) for step in steps])
        expected = np.bincount(labels, minlength=n_labels) / len(labels)
        return of_steps, ((of_steps - expected) ** 2).mean(axis=0) / (expected * (1 - expected) / per_step)

    sorted_labels, variance = shares(np.arange(len(lengths)) * N_LABELS // len(lengths), N_LABELS)
    _, by_length = shares(np.argsort(np.argsort(lengths, kind="stable")) * 10 // len(lengths), 10)
    correlations = [np.corrcoef(sorted_labels[:, label], means)[0, 1] for label in range(N_LABELS)]
    return {
        "label_variance": float(variance.mean()),
        "length_label_variance": float(by_length.mean()),
        "length_label_worst": float(by_length.max()),
        "length_variance": float(means.var() / (lengths.var() / per_step)),
        "correlation": float(np.sqrt(np.mean(np.square(correlations)))),
        "chance": len(steps) ** -0.5,
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
    for name, (ranks, micro_batch, accumulation) in SETTINGS.items():
        slots = ranks * accumulation
        common = {"seed": 0, "epoch": 0, "slots": slots, "group": ranks, "lengths": (prompts, tails)}
        ours = measure(
            make_plan(costs, **common, samples_per_step=slots * micro_batch, balance="cost"), prompts, tails, ranks
        )
        samples = round(slots * ours["samples"])  # as many at random, in the same number of slots
        random = measure(make_plan(costs, **common, samples_per_step=samples, balance="none"), prompts, tails, ranks)
        results[name] = {**ours, "random": random}
        print(f"{name:24s}{'balanced':>10s}{'random':>10s}")
        for key, value in ours.items():
            print(f"  {key:22s}{value:10.4f}{random[key]:10.4f}")
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
