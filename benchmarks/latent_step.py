"""One training step (forward and backward, no optimizer): ours, the original algorithm, and an ordinary single pass.

    python benchmarks/latent_step.py                                    # slim: prefix 1024, vocabulary 151,674, K = 6
    python benchmarks/latent_step.py --preset gpt2 --json gpt2.json     # GPT-2 124M at Meta's settings
    python benchmarks/latent_step.py --preset internvl3-1b --device cuda
    python benchmarks/latent_step.py --held-against-k 0 2 6 12          # memory only, ours for several K

The same random weights and tokens on every side; all figures of a run come from that run; each ratio is ours divided by
the other's. Time is the fastest of several interleaved runs (the median is printed too), processor time where one
thread of a CPU computes; memory is each side's peak over forward and backward in a fresh process; gathered bytes are
those of `gathered.py`, which has a model of its own. `sides.py` says what each side is.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

import torch

from benchmarks.gathered import measure_gathered
from benchmarks.measure import measure_memory, time_interleaved
from benchmarks.shapes import Shape, add_shape_arguments, describe, shape_from, text_config
from benchmarks.sides import ABLATION, Step, build_step
from coconut.evaluation.flops import attention_flops_per_pair, decoder_flops_per_token, forward_flops
from coconut.model import MultimodalCoconut


def floor_ratio(shape: Shape) -> float:
    """Arithmetic of one pass over the same tokens and K - 1 passes of one token, divided by that of the one pass."""
    config = text_config(shape)
    tokens = shape.batch * shape.length
    one = forward_flops(config, tokens, n_samples=shape.batch, n_logit_tokens=shape.batch * shape.labels)
    token = decoder_flops_per_token(config) + attention_flops_per_pair(config) * (shape.prefix + shape.latents)
    return 1 + max(shape.latents - 1, 0) * shape.batch * token / one


def run_step(step: Step, model: MultimodalCoconut) -> None:
    step().backward()
    model.zero_grad()


def measure_times(shape: Shape, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds a step of every side, `+checkpointing` where activations are recomputed."""
    sides: list[tuple[str, bool]] = [("ours", False), ("single_pass", False), ("ours", True), ("single_pass", True)]
    if options.repeats_original:
        sides += [(side, False) for side in (ABLATION if options.ablation else ("original",))]
    runs, repeats = {}, {}
    for side, checkpointing in sides:
        step, model = build_step(side, shape, options.device, checkpointing)
        name = side + "+checkpointing" * checkpointing
        runs[name] = lambda step=step, model=model: run_step(step, model)
        repeats[name] = options.repeats_original if side in ("original", "original-logits") else options.repeats
    return time_interleaved(runs, repeats)


def measure_memories(shape: Shape, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    names = ["ours", "single_pass", "ours+checkpointing", "single_pass+checkpointing"]
    if options.repeats_original:
        names += list(ABLATION) if options.ablation else ["original"]
    return {
        name: measure_memory(
            name.removesuffix("+checkpointing"), shape, options.device, name.endswith("+checkpointing")
        )
        for name in names
    }


def held_against_k(shape: Shape, latents: list[int], device: str) -> list[dict[str, float]]:
    """Memory held after a checkpointed forward, in MiB, beside that of a single pass over as many tokens."""
    table = []
    for k in latents:
        with_k = replace(shape, latents=k)
        ours = measure_memory("ours", with_k, device, checkpointing=True)
        single = measure_memory("single_pass", with_k, device, checkpointing=True)
        table.append({
            "latents": k,
            "held_mib": ours["held_mib"],
            "held_single_pass_mib": single["held_mib"],
            "held_vs_single_pass": ours["held_mib"] / single["held_mib"],
            "peak_vs_single_pass": ours["peak_mib"] / single["peak_mib"],
        })  # fmt: skip
        line = "K {latents:3}  held {held_mib:7.1f} MiB, single pass {held_single_pass_mib:7.1f}: "
        line += "{held_vs_single_pass:.2f}x; peak {peak_vs_single_pass:.2f}x"
        print(line.format(**table[-1]), flush=True)
    return table


def ratios(times: dict[str, Any], memory: dict[str, Any]) -> dict[str, float]:
    """Ours divided by the other's, for every pair that was measured."""
    result = {}
    for other, suffix in (("original", ""), ("single_pass", ""), ("single_pass", "+checkpointing")):
        ending = suffix.replace("+", "_")
        ours, theirs = "ours" + suffix, other + suffix
        if theirs in times:
            result[f"time_vs_{other}{ending}"] = times[ours]["min_s"] / times[theirs]["min_s"]
        if theirs in memory:
            result[f"memory_vs_{other}{ending}"] = memory[ours]["peak_mib"] / memory[theirs]["peak_mib"]
            result[f"held_vs_{other}{ending}"] = memory[ours]["held_mib"] / memory[theirs]["held_mib"]
    return result


def gain_split(times: dict[str, Any], memory: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What each step from the original to ours saves: seconds, and MiB of the peak."""
    names = {"logits": "original-logits", "lists": "original-logits-lists", "states": "original-logits-lists-states",
             "cache": "ours"}  # fmt: skip
    before, split = "original", {}
    for part, after in names.items():
        split[part] = {}
        if before in times and after in times:
            split[part]["seconds"] = times[before]["min_s"] - times[after]["min_s"]
        if before in memory and after in memory:
            split[part]["peak_mib"] = memory[before]["peak_mib"] - memory[after]["peak_mib"]
        before = after
    return split


def print_table(times: dict[str, Any], memory: dict[str, Any]) -> None:
    print(f"{'':32}{'min s':>9}{'median s':>10}{'runs':>6}{'held MiB':>10}{'peak MiB':>10}")
    for name in times or memory:
        line = f"{name:32}"
        if name in times:
            line += "{min_s:9.3f}{median_s:10.3f}{runs:6}".format(**times[name])
        if name in memory:
            line += "{held_mib:10.1f}{peak_mib:10.1f}".format(**memory[name])
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser)
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=1, help="CPU threads of the timed process (default 1)")
    add("--repeats", type=int, default=5, help="timed runs a side (default 5)")
    add("--repeats-original", type=int, default=2, help="timed runs of the slow original (default 2; 0: leave it out)")
    add("--no-ablation", dest="ablation", action="store_false", help="leave out what takes the original apart")
    add("--no-time", dest="time", action="store_false", help="measure memory only")
    add("--no-memory", dest="memory", action="store_false", help="measure time only")
    add("--no-gathered", dest="gathered", action="store_false", help="leave out what ZeRO-3 gathers on two ranks")
    add("--held-against-k", type=int, nargs="+", metavar="K", help="only: held memory with checkpointing for these K")
    add("--json", type=Path, help="write everything there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = shape_from(options)
    result: dict[str, Any] = {"shape": describe(shape), "device": options.device, "threads": options.threads}
    print(f"{shape}, {options.device}, {options.threads} threads", flush=True)
    if options.held_against_k:
        result["held_against_k"] = held_against_k(shape, options.held_against_k, options.device)
    else:
        memory = measure_memories(shape, options) if options.memory else {}
        times = measure_times(shape, options) if options.time else {}
        print_table(times, memory)
        result |= ratios(times, memory)
        if options.gathered and options.device == "cpu":
            result |= {"gathered_vs_k0": measure_gathered()["gathered_vs_k0"]}
        result |= {"floor_vs_single_pass": floor_ratio(shape), "times": times, "memory": memory}
        if options.ablation and options.repeats_original:
            result["gain_split"] = gain_split(times, memory)
        print(json.dumps({name: value for name, value in result.items() if name not in ("times", "memory", "shape")}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
