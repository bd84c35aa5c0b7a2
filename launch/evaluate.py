"""Ask a trained model every question of a data set, greedily, and write down what it says.

    python launch/evaluate.py --checkpoint RUN/final --data data/arrow_maze/shards/test --out RUN/eval/test
    python launch/evaluate.py --checkpoint RUN --data SHARDS/test SHARDS/test_paths --controls --out RUN/eval
    deepspeed launch/evaluate.py ...     or torchrun --nproc-per-node 2: the same numbers from several ranks

OUT/predictions.jsonl has one line a sample; OUT/summary.json has accuracy with its 95 % interval, generated tokens,
sequential forward passes and seconds a sample. Several evaluations get a folder each below OUT, named after the data
and what was changed: OUT/test, OUT/test-images_shuffled, OUT/test-noise. `launch/report.py` makes a page of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.evaluation.result import THOUGHTS, EvaluationOptions
from coconut.evaluation.run import evaluate_checkpoint, find_checkpoint, plan_jobs
from coconut.types import CoconutError


def build_parser() -> argparse.ArgumentParser:
    default = EvaluationOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="folder that the trainer wrote: RUN/final, RUN/stage_2, or RUN")
    add("--data", type=Path, required=True, nargs="+", help="folders of shards, or JSON or JSONL files")
    add("--out", type=Path, required=True, help="folder to write predictions.jsonl and summary.json to")
    controls = "also, on the first data set: with the images shuffled, and (with latents) with noise for thoughts"
    add("--controls", action="store_true", help=controls)
    add("--image-root", type=Path, help="folder of a JSON file's images (default: the folder of the file)")
    add("--limit", type=int, help="only the first so many samples (default: all)")
    add("--batch-size", type=int, default=default.batch_size, help="questions a batch (default: %(default)s)")
    add("--max-new-tokens", type=int, default=default.max_new_tokens, help="cut a text there (default: %(default)s)")
    add("--shuffle-images", action="store_true", help="show each question the image of another one")
    add("--thoughts", choices=THOUGHTS, default=default.thoughts, help="noise: random vectors of the same norm instead")
    add("--seed", type=int, default=default.seed, help="of the shuffling and the noise (default: %(default)s)")
    add("--num-threads", type=int, help="CPU threads a rank (default: torch's choice, or OMP_NUM_THREADS)")
    # The deepspeed launcher adds this to the command line of every rank; the environment says the same.
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        options = EvaluationOptions(
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            limit=arguments.limit,
            shuffle_images=arguments.shuffle_images,
            thoughts=arguments.thoughts,
            seed=arguments.seed,
        )
        checkpoint = find_checkpoint(arguments.checkpoint)
        jobs = plan_jobs(checkpoint, arguments.data, arguments.out, options, arguments.controls)
    except CoconutError as error:  # the same on every rank: said once
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        results = evaluate_checkpoint(
            checkpoint, jobs, image_root=arguments.image_root, num_threads=arguments.num_threads
        )
    except CoconutError as error:
        print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        for job, result in zip(jobs, results, strict=True):
            print(f"{job.out}: {result.headline()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
