"""Greedy generation: ours in batches, the original algorithm one sample at a time, transformers without latents.

    python benchmarks/generation.py                           # prefix 512, 4 layers of 256, K = 6, batch 1 8 16 32
    python benchmarks/generation.py --json generation.json
    python benchmarks/generation.py --preset internvl3-1b --device cuda

New tokens a second and forward passes of the decoder, from one run, interleaved; the same weights and prompts on every
side, end tokens suppressed so that every row gets as many new tokens, and the first row's tokens compared with the
original's. The original's rate does not depend on the batch: it takes the samples one after the other. transformers'
`generate` is given the same prompts, a latent being a token like any other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

import torch
from torch import Tensor

from benchmarks.measure import time_interleaved
from benchmarks.original import OriginalCoconut
from benchmarks.shapes import Shape, add_shape_arguments, build_batch, build_model, describe, shape_from
from coconut.model import MultimodalCoconut


class PassCounter:
    """Counts the calls of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.n_calls = 0
        module.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.n_calls += 1

    def during(self, run: Callable[[], Any]) -> tuple[int, Any]:
        before = self.n_calls
        result = run()
        return self.n_calls - before, result


def prompts(shape: Shape, batch: int, device: str) -> dict[str, Tensor]:
    """Prompts that end with the end-latent token, and the image tiles where there are some."""
    inputs = build_batch(replace(shape, batch=batch, labels=0), device)
    del inputs["labels"]
    return inputs


def build_runs(
    model: MultimodalCoconut, shape: Shape, batch: int, n_new: int, device: str
) -> dict[str, Callable[[], Tensor]]:
    """Ours and transformers' generation of one batch, each returning the new tokens [batch, n_new]."""
    inputs = prompts(shape, batch, device)
    settings: dict[str, Any] = dict(do_sample=False, max_new_tokens=n_new, min_new_tokens=n_new)
    plain = dict(inputs)
    if "pixel_values" in plain:
        plain["pixel_values"] = plain["pixel_values"].to(model.base_model.dtype)

    def without_latents() -> Tensor:
        ids: Tensor = model.base_model.generate(**plain, pad_token_id=model.eos_token_id, **settings)
        return ids[:, inputs["input_ids"].shape[1] :]

    return {"ours": lambda: model.generate(**inputs, **settings), "transformers": without_latents}


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    model = build_model(shape, options.device).eval()
    counter = PassCounter(model.backbone.decoder)
    runs: dict[str, Callable[[], Any]] = {}
    tokens: dict[str, int] = {}
    for batch in options.batches:
        for name, run in build_runs(model, shape, batch, options.new_tokens, options.device).items():
            runs[f"{name} batch {batch}"] = run
            tokens[f"{name} batch {batch}"] = batch * options.new_tokens
    repeats = dict.fromkeys(runs, options.repeats)
    same = None
    if options.repeats_original:
        original = OriginalCoconut(model.base_model, model.latent_token_id, eos_token_id=-1)
        prompt = prompts(shape, options.batches[0], options.device)["input_ids"][:1]
        runs["original"] = lambda: original.generate(prompt, options.new_tokens)
        tokens["original"] = options.new_tokens
        repeats["original"] = options.repeats_original
        ours = runs[f"ours batch {options.batches[0]}"]()[0].tolist()
        same = ours == original.generate(prompt, options.new_tokens)
    passes = {name: counter.during(run)[0] for name, run in runs.items() if name != "original"}
    if options.repeats_original:
        passes["original"] = original.n_forwards
    times = time_interleaved(runs, repeats)
    table = {
        name: {**times[name], "passes": passes[name], "tokens_a_second": tokens[name] / times[name]["min_s"]}
        for name in runs
    }
    return {"table": table, "same_tokens_as_original": same}


def ratios(table: dict[str, dict[str, float]], batches: list[int], of_interest: int) -> dict[str, Any]:
    """Tokens a second, ours divided by the other's; for every batch, and alone for the batch of interest."""
    rate = {name: row["tokens_a_second"] for name, row in table.items()}
    against = {batch: rate[f"ours batch {batch}"] / rate[f"transformers batch {batch}"] for batch in batches}
    result: dict[str, Any] = {"tokens_vs_transformers_by_batch": against}
    result["tokens_vs_transformers"] = against[of_interest]
    if "original" in rate:
        by_batch = {batch: rate[f"ours batch {batch}"] / rate["original"] for batch in batches}
        result |= {"tokens_vs_original_by_batch": by_batch, "tokens_vs_original": by_batch[of_interest]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=1, help="CPU threads (default 1)")
    add("--batches", type=int, nargs="+", default=[1, 8, 16, 32], help="default 1 8 16 32")
    add("--new-tokens", type=int, default=32, help="new tokens a row (default 32)")
    add("--repeats", type=int, default=3, help="timed runs (default 3)")
    add("--repeats-original", type=int, default=1, help="timed runs of the slow original (default 1; 0: leave it out)")
    add("--json", type=Path, help="write everything there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = shape_from(options)
    if options.prefix is None and options.preset == "slim":
        shape = replace(shape, prefix=512)
    if shape.tiles:
        options.repeats_original = 0  # it reads text only
    of_interest = 16 if 16 in options.batches else options.batches[-1]
    result = measure(shape, options)
    result |= ratios(result["table"], options.batches, of_interest)
    result |= {"shape": describe(shape), "device": options.device, "threads": options.threads, "batch": of_interest}
    print(f"{shape}, {options.device}, {options.threads} threads, {options.new_tokens} new tokens a row")
    print(f"{'':24}{'tokens/s':>10}{'passes':>8}{'min s':>9}{'median s':>10}")
    for name, row in result["table"].items():
        print(f"{name:24}" + "{tokens_a_second:10.1f}{passes:8}{min_s:9.3f}{median_s:10.3f}".format(**row))
    print(json.dumps({name: value for name, value in result.items() if name not in ("table", "shape")}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
