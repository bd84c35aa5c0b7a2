"""Ask a trained model every question of a data set, greedily, and write down what it says.

    python launch/evaluate.py --checkpoint RUN/final --data data/arrow_maze/shards/test --out RUN/eval/test
    python launch/evaluate.py --checkpoint RUN --data SHARDS/test SHARDS/test_paths --controls --out RUN/eval
    python launch/evaluate.py ... --latents 0..4                  also with 0, 1, 2, 3, 4 thoughts
    deepspeed launch/evaluate.py ...     or torchrun --nproc-per-node 2: the same numbers from several ranks
    python launch/evaluate.py --compare A/eval/test B/eval/test   two evaluations of the same questions, paired

OUT/predictions.jsonl has one line a sample; OUT/summary.json has accuracy with its 95 % interval, generated tokens,
sequential forward passes and seconds a sample. Several evaluations get a folder each below OUT, named after the data
and what was changed: OUT/test, OUT/test-images_shuffled, OUT/test-noise, OUT/test-latents_2. An evaluation that was
killed goes on when it is started again, on any number of ranks; one that is complete is not repeated.
`launch/report.py` makes a page of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.evaluation.compare import compare
from coconut.evaluation.metrics import METRICS
from coconut.evaluation.result import BY, THOUGHTS, EvaluationOptions, require_folder
from coconut.evaluation.run import evaluate_checkpoint, find_checkpoint, plan_jobs
from coconut.types import CoconutError, ConfigError


def build_parser() -> argparse.ArgumentParser:
    default = EvaluationOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="folder that the trainer wrote: RUN/final, RUN/stage_2, or RUN")
    add("--data", type=Path, nargs="+", help="folders of shards, or JSON or JSONL files")
    add("--out", type=Path, help="folder to write predictions.jsonl and summary.json to")
    add("--compare", type=Path, nargs=2, metavar="DIR", help="compare two evaluation folders, and evaluate nothing")
    controls = "also, on the first data set: with images shuffled, and with noise for thoughts, where it has these"
    add("--controls", action="store_true", help=controls)
    latents = "also, on the first data set, with so many thoughts: 0..4, or 0,2,4"
    add("--latents", type=read_numbers, default=(), metavar="NUMBERS", help=latents)
    metrics = "what makes an answer right (default: %(default)s); choice, vqa and aokvqa need choices or direct_answers"
    add("--metric", choices=tuple(METRICS), default=default.metric, help=metrics)
    by = "likelihood: answer with the choice that is likeliest right after the thoughts, without writing anything"
    add("--by", choices=BY, default=default.by, help=by)
    add("--image-root", type=Path, help="folder of a JSON file's images (default: the folder of the file)")
    add("--limit", type=int, help="only the first so many samples (default: all)")
    add("--batch-size", type=int, default=default.batch_size, help="questions a batch (default: %(default)s)")
    add("--max-new-tokens", type=int, default=default.max_new_tokens, help="cut a text there (default: %(default)s)")
    add("--shuffle-images", action="store_true", help="show each question the image of another one")
    add("--thoughts", choices=THOUGHTS, default=default.thoughts, help="noise: random vectors of the same norm instead")
    add("--seed", type=int, default=default.seed, help="of the shuffling and the noise (default: %(default)s)")
    threads = "CPU threads a rank (default: %(default)s; another number may change the last digit of a likelihood)"
    add("--num-threads", type=int, default=1, help=threads)
    add("--fresh", action="store_true", help="ask everything anew, also what is complete")
    # The deepspeed launcher adds this to the command line of every rank; the environment says the same.
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        if arguments.compare:
            if arguments.checkpoint or arguments.data or arguments.out:
                raise ConfigError("--compare evaluates nothing: leave out --checkpoint, --data and --out")
            print(compare(*arguments.compare).text())
            return 0
        require(arguments)
        options = EvaluationOptions(
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            limit=arguments.limit,
            shuffle_images=arguments.shuffle_images,
            thoughts=arguments.thoughts,
            seed=arguments.seed,
            metric=arguments.metric,
            by=arguments.by,
        )
        checkpoint = find_checkpoint(arguments.checkpoint)
        jobs = plan_jobs(
            checkpoint,
            arguments.data,
            arguments.out,
            options,
            arguments.controls,
            arguments.latents,
            arguments.image_root,
        )
        for job in jobs:
            require_folder(job.out)
    except CoconutError as error:  # the same on every rank: said once
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        results = evaluate_checkpoint(
            checkpoint,
            jobs,
            image_root=arguments.image_root,
            num_threads=arguments.num_threads,
            fresh=arguments.fresh,
        )
    except CoconutError as error:
        print(f"{f'[rank {rank}] ' if rank else ''}error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        for job, result in zip(jobs, results, strict=True):
            print(f"{job.out}: {result.headline()}")
    return 0


def require(arguments: argparse.Namespace) -> None:
    """What an evaluation needs and a comparison does not."""
    missing = [f"--{name}" for name in ("checkpoint", "data", "out") if not getattr(arguments, name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: give --checkpoint, --data and --out, or --compare")
    if arguments.num_threads < 1:
        raise ConfigError(f"--num-threads is {arguments.num_threads}; give a number of at least 1")


def read_numbers(text: str) -> tuple[int, ...]:
    """0..4 or 0,2,4 as numbers, each once."""
    first, dots, last = text.partition("..")
    words = [first, last] if dots else text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers; write 0..4 or 0,2,4")
    numbers = [int(word) for word in words]
    if dots and numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(f"{text!r} goes down; write {numbers[1]}..{numbers[0]}")
    return tuple(range(numbers[0], numbers[1] + 1)) if dots else tuple(dict.fromkeys(numbers))


if __name__ == "__main__":
    sys.exit(main())
