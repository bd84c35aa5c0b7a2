"""What the loader costs, against decoding and tiling the same bytes from memory in a plain loop.

    python benchmarks/loader.py [--json FILE] [--memory]

Rate: JPEG pictures of four usual sizes (1 to 13 tiles of 448 x 448), read from tars by one loader process, encoded,
staged and collated into micro-batches of four; the plain loop only decodes and tiles. Both are timed in turns, the
loop too in a process of its own, and the fastest round of each counts, since other work on the machine only ever slows
down. loader_vs_plain compares wall time, loader_vs_plain_cpu the processor time of the two processes.
--memory: growth of loader process and reader in a pass over 50,000 samples.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coconut.data.collate import MultimodalCollator
from coconut.data.encode import SampleEncoder
from coconut.data.image import ImageProcessor
from coconut.data.plan import make_plan
from coconut.data.shards import ShardReader, write_shards
from coconut.data.stage_text import build_prompt_template, stage_spec
from coconut.data.stream import StreamLoader
from coconut.types import SPECIAL_TOKENS, Sample

SIZES = ((640, 480), (500, 375), (448, 448), (850, 600))
MICRO_BATCH = 4
IMAGE_TOKENS = ["<img>", "<IMG_CONTEXT>", "</img>"]


def build_tokenizer() -> Any:
    words = ["<pad>", "<unk>", "<eos>", "\n", "how", "many", "birds", "are", "there", "three", "###"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|#+|\w+|[^\w\s#]"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    tokenizer.add_tokens([*IMAGE_TOKENS, *SPECIAL_TOKENS], special_tokens=True)
    return tokenizer


def picture(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG with detail at several scales, some 60 to 100 kB."""
    draw = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells, weight in ((4, 0.6), (40, 0.3), (160, 0.1)):
        small = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * np.asarray(small.resize(size, Image.Resampling.BICUBIC))
    file = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def samples(n: int, pictures: list[bytes]) -> Iterator[Sample]:
    for number in range(n):
        image = (pictures[number % len(pictures)],) if pictures else ()
        yield Sample(f"sample-{number}", "how many birds are there", ("there are three",) * 3, "three", image)


def build_loader(reader: ShardReader, image_size: int, num_workers: int, start: float = 0.0) -> StreamLoader:
    """One rank's loader of an epoch, beginning at the given share of it."""
    tokenizer = build_tokenizer()
    processor = ImageProcessor(image_size, 12 if image_size == 448 else 1)
    encoder = SampleEncoder(tokenizer, processor, build_prompt_template(tokenizer), (image_size // 28) ** 2)
    ids = tuple(tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    costs = reader.costs(processor.num_patches, encoder.tokens_per_patch)
    plan = make_plan(costs, seed=0, epoch=0, slots=1, samples_per_step=MICRO_BATCH)
    return StreamLoader(
        reader,
        plan,
        encode=encoder.encode,
        stage=partial(encoder.with_stage, spec=stage_spec(2), ids=ids),
        collate=MultimodalCollator(tokenizer, processor, ids[1]).collate_batch,
        num_workers=num_workers,
        start_step=int(len(plan) * start),
    )


def plain_loop(contents: list[bytes], sent: Any) -> None:
    """Decode and tile, in a process of its own as a loader's worker is."""
    torch.set_num_threads(1)
    processor = ImageProcessor(448, 12)
    processor.process_image(contents[0])
    begin, busy = time.perf_counter(), time.process_time()
    for content in contents:
        processor.process_image(content)
    sent.send((time.perf_counter() - begin, time.process_time() - busy))


def time_plain(contents: list[bytes]) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=plain_loop, args=(contents, send))
    process.start()
    seconds: tuple[float, float] = receive.recv()
    process.join()
    return seconds


def time_loader(loader: StreamLoader) -> tuple[float, float]:
    """Seconds of an epoch on the clock, and of the loader process: from the first batch, before which it starts, to the
    one after which it may have ended."""
    batches = iter(loader)
    n_first = len(next(batches).keys)
    worker = multiprocessing.active_children()[0].pid or 0
    begin, busy = time.perf_counter(), processor_time(worker)
    n_samples = sum(len(batch.keys) for batch in islice(batches, len(loader) - 5))
    elapsed, worked = time.perf_counter() - begin, processor_time(worker) - busy
    n_rest = sum(len(batch.keys) for batch in batches)
    share = (n_samples + n_first + n_rest) / n_samples
    return elapsed * share, worked * share


def processor_time(process: int) -> float:
    """Seconds that a process has computed, in user and in system mode."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_rate(folder: Path, rounds: int, n: int) -> dict[str, float]:
    pictures = [picture(SIZES[number % len(SIZES)], number) for number in range(n)]
    write_shards(samples(n, pictures), folder, shard_size_mb=8)
    reader = ShardReader(folder)
    loader = build_loader(reader, 448, num_workers=1)
    times: dict[str, list[tuple[float, float]]] = {"loader": [], "plain": []}
    for _ in range(rounds):
        times["plain"].append(time_plain(pictures))
        times["loader"].append(time_loader(loader))
    clock, processor = ({name: min(t[kind] for t in values) for name, values in times.items()} for kind in (0, 1))
    return {
        **{f"{name}_samples_per_s": n / seconds for name, seconds in clock.items()},
        "loader_vs_plain": clock["plain"] / clock["loader"],
        "loader_vs_plain_cpu": processor["plain"] / processor["loader"],
        "tiles_per_sample": float(np.mean([ImageProcessor(448, 12).num_patches(*size) for size in SIZES])),
        "kB_per_picture": float(np.mean([len(content) for content in pictures]) / 1000),
    }


def resident_mb(process: int) -> float:
    """Memory of a process that it shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def measure_memory(folder: Path, n: int) -> dict[str, float]:
    """Growth of reader and worker from a tenth of an epoch on, in MB."""
    pictures = [picture((56, 56), number) for number in range(200)]
    write_shards(samples(n, pictures), folder, shard_size_mb=8)
    loader = build_loader(ShardReader(folder), 56, num_workers=1)
    n_batches = len(loader)
    seen: dict[int, dict[str, float]] = {}
    for number, _ in enumerate(loader):
        if number in (n_batches // 10, n_batches - 20):  # the process is alive until the end is near
            seen[number] = memory_now()
    early, late = seen.values()
    return {f"{name}_growth_MB": late[name] - early[name] for name in early} | {"samples": n}


def memory_now() -> dict[str, float]:
    children = multiprocessing.active_children()
    return {"reader": resident_mb(os.getpid()), "worker": resident_mb(children[0].pid or 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side is timed")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--memory", action="store_true", help="also measure memory over 50,000 samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, float | dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        results |= measure_rate(Path(folder) / "rate", args.rounds, args.pictures)
        if args.memory:
            results["memory"] = measure_memory(Path(folder) / "memory", 50_000)
    for name, value in results.items():
        print(name, value if isinstance(value, dict) else f"{value:.3f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
