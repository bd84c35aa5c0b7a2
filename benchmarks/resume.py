"""How long a run takes to find its place again in a set of many shards, against a run that begins with the epoch.

    python benchmarks/resume.py [--json FILE] [--shards 1000] [--rounds 10]

A set of small samples, a hundred a shard, is written to a temporary folder. Then, in a fresh process each time and in
turns, the set is opened, the epoch planned, a loader with one worker process started, and its first batch waited for:
at the epoch's first step, in its middle, and near its end. The fastest round of each counts, since other work on the
machine only ever slows down. What a process imports is there already.

    zero_s, middle_s, end_s                seconds from nothing open to the first batch
    zero_cpu_s, middle_cpu_s, end_cpu_s    seconds that the process and its worker computed in this time
    middle_vs_zero, end_vs_zero            ratios of the clock, and with _cpu of the processor
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loader import build_loader, samples
from coconut.data.shards import ShardReader, write_shards

SAMPLES_A_SHARD = 100
SHARD_MB = 0.1025  # so many samples of two tar blocks, and the zeros that end a tar
STARTS = {"zero": 0.0, "middle": 0.5, "end": 0.999}  # as a share of the epoch


def first_batch(folder: Path, start: float, sent: Any) -> None:
    """Send seconds until the first batch, on the clock and of the processor, and the batch's step."""
    begin, busy = time.perf_counter(), processor_time()
    loader = build_loader(ShardReader(folder), 28, num_workers=1, start=start)
    batches = iter(loader)  # held, or its worker would end
    batch = next(batches)
    elapsed = time.perf_counter() - begin
    worker = multiprocessing.active_children()[0].pid
    sent.send((elapsed, processor_time() - busy + processor_time(worker), batch.extras["step"]))


def processor_time(process: int | str | None = "self") -> float:
    """Seconds that a process has computed."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def timed(folder: Path, start: float) -> tuple[float, float, int]:
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=first_batch, args=(folder, start, send))
    process.start()
    send.close()  # so that a process that dies is noticed
    result: tuple[float, float, int] = receive.recv()
    process.join()
    return result


def measure(folder: Path, n_shards: int, rounds: int) -> dict[str, float]:
    begin = time.perf_counter()
    n_samples = write_shards(samples(n_shards * SAMPLES_A_SHARD, []), folder, shard_size_mb=SHARD_MB)
    results: dict[str, float] = {
        "shards": len(list(folder.glob("*.tar"))),
        "samples": n_samples,
        "writing_s": time.perf_counter() - begin,
    }
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in STARTS}
    timed(folder, 0.0)  # files into the system's cache
    for _ in range(rounds):
        for name, start in STARTS.items():
            found[name].append(timed(folder, start))
    assert found["zero"][0][2] == 0 < found["middle"][0][2] < found["end"][0][2], "each begins at its own step"
    for place, kind in enumerate(("", "_cpu")):
        seconds = {name: min(one[place] for one in values) for name, values in found.items()}
        results |= {f"{name}{kind}_s": value for name, value in seconds.items()}
        results |= {f"{name}_vs_zero{kind}": seconds[name] / seconds["zero"] for name in ("middle", "end")}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10, help="times that each start is timed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder) / "shards", args.shards, args.rounds)
    for name, value in results.items():
        print(name, f"{value:.3f}" if isinstance(value, float) else value)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
