"""Train a multimodal CoCoNuT through its stages.

    deepspeed launch/train.py --deepspeed ds_configs/zero3.json                       the demo: the arrow maze
    deepspeed launch/train.py --deepspeed ds_configs/zero3.json --config args/X.yaml learning_rate=5e-6 max_steps=100
    torchrun --nproc-per-node 2 launch/train.py ...     or, for debugging on one rank, python launch/train.py ...

On a machine without GPUs `deepspeed --num_gpus 2` starts two ranks. Results go to RUN = save_path/name: metrics.jsonl,
log.txt, checkpoints/, and RUN/stage_K/ and RUN/final/, which plain transformers loads. `touch RUN/stop` stops a run at
its next step, with a checkpoint; the same command goes on where a run was stopped or died (docs/checkpoints.md).
--dry-run does everything but the steps, says what they would be, and writes nothing but RUN/log.txt.
Exit codes: 0 done or stopped; 2 an error that a restart does not mend; 75 a rank hung; others: start again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.config import Config, load_config, validate_config
from coconut.config.faults import raise_faults
from coconut.types import CoconutError, ConfigError

if TYPE_CHECKING:
    from coconut.training import MultimodalCoTTrainer

DEMO_DATA = Path("data/arrow_maze")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="args/demo.yaml", help="run configuration (default: %(default)s, the arrow maze)")
    # deepspeed.add_config_arguments would make this a flag without a value.
    add("--deepspeed", metavar="FILE", help="DeepSpeed configuration, such as ds_configs/zero3.json")
    add(
        "--dry-run",
        action="store_true",
        help="all but the steps: data, model, engine, plan; then say what they would be",
    )
    add("overrides", nargs="*", metavar="key=value", help="configuration keys, nested ones as stages.1.epochs=3")
    # The deepspeed launcher adds this to the command line of every rank; the environment says the same.
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.deepspeed:
        overrides.append(f"deepspeed={arguments.deepspeed}")
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        if not Path(arguments.config).exists() and (ROOT / arguments.config).exists():
            raise ConfigError(f"{arguments.config} is not in this folder; start from the project's: cd {ROOT}")
        config = load_config(arguments.config, validate=False, overrides=overrides)
        if not arguments.dry_run:
            make_demo_data(config)
        validate_config(config)
        if config.only_eval and arguments.dry_run:
            raise ConfigError("--dry-run is for training; only_eval = true trains nothing: leave one of them out")
        if config.only_eval:
            evaluate_only(config)
            return 0
        if is_done(config):
            if is_first:
                print(f"stage {config.stop_after_stage} of {config.run_dir} is done; there is nothing to do")
            return 0
        if arguments.dry_run:
            dry_run(config)
            return 0
        tokenizer, processor = check(config)
    except CoconutError as error:  # the same on every rank: said once
        if is_first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    from coconut.training.stop import noting_signals

    try:
        with noting_signals():  # a stop that comes while the model is loaded waits for the first step
            train(config, tokenizer, processor)
    except CoconutError as error:  # of this rank's data, perhaps
        print(f"{'' if is_first else '[rank ' + os.environ['RANK'] + '] '}error: {error}", file=sys.stderr)
        return 2
    return 0


def make_demo_data(config: Config) -> None:
    """Draw the arrow maze and build its model when the configuration asks for them and they are missing.

    One process makes them, the others wait: each takes the folder's lock in turn, and then finds all in place.
    """
    wanted = [path for path in map(config.get, ("train_data_path", "model_id")) if isinstance(path, str)]
    if not any(Path(path).is_relative_to(DEMO_DATA) and not Path(path).exists() for path in wanted):
        return
    raise_faults(config.faults, config.origins)  # nothing is made for settings that cannot be used
    from launch.prepare_data import prepare_arrow_maze

    prepare_arrow_maze(DEMO_DATA)


def is_done(config: Config) -> bool:
    """Whether the stage that this run is to end with is complete: then no rank has to load anything.

    Raises:
        ConfigError: it is, in a run with other settings.
    """
    from coconut.training import StageManager
    from coconut.training.resume import check_same_run
    from coconut.training.run_folder import is_stage_done

    stage, last = config.stop_after_stage, StageManager.from_config(config).stages[-1]
    # After the last stage the test data are scored, which the stage's own marker does not tell.
    found = config.resume == "auto" and stage not in (None, last) and is_stage_done(config.run_dir, stage)
    if found:
        check_same_run(config)
    return found


def dry_run(config: Config) -> None:
    """Everything that `main` does for a training run, but the steps."""
    from coconut.training.dry_run import dry_run, scratch_cache
    from coconut.utils.distributed import init_distributed_training, shutdown_distributed

    config.update(use_wandb=False)
    init_distributed_training(force=True)
    with scratch_cache(config):
        dry_run(build_trainer(config, *check(config, is_dry=True), is_dry=True))
    shutdown_distributed()


def check(config: Config, *, is_dry: bool = False) -> tuple[Any, Any]:
    """Join the other ranks, and check all that can be checked before a weight is loaded.

    Args:
        is_dry: change nothing in the run folder.

    Returns:
        tokenizer and image processor.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from coconut.config.deepspeed import resolve_ds_config
    from coconut.model.adapters import LoraSettings, check_trained
    from coconut.model.auxiliary import load_auxiliary_loss
    from coconut.model.loading import load_outline
    from coconut.training.resume import take_run
    from coconut.utils.distributed import (
        collective_timeout_s,
        get_world_size,
        init_distributed_training,
        on_main_first,
    )
    from coconut.utils.logging import setup_logging
    from coconut.utils.tokenizer import load_tokenizer

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    disable_progress_bar()  # transformers' own, at each loading and saving, from every rank
    init_distributed_training(force=True, timeout_s=collective_timeout_s(config.hang_timeout_s))
    if not is_dry:
        on_main_first(lambda: take_run(config.run_dir))
    setup_logging(config)
    for path in config.auxiliary_losses:
        load_auxiliary_loss(path)
    if config.freeze or config.lora_rank is not None:
        start = config.load_model_path or config.model_id
        check_trained(load_outline(start, load_tokenizer(start)), config.freeze, LoraSettings.from_config(config))
    resolve_ds_config(config, world_size=get_world_size(), hidden_size=1024)  # the true width is not known yet
    return load_inputs(config)


def train(config: Config, tokenizer: Any, processor: Any) -> None:
    """Load the model and train it."""
    from coconut.utils.distributed import shutdown_distributed

    build_trainer(config, tokenizer, processor).train()
    shutdown_distributed()


def build_trainer(config: Config, tokenizer: Any, processor: Any, *, is_dry: bool = False) -> MultimodalCoTTrainer:
    """Load the model and open the data."""
    from coconut.model import MultimodalCoconut
    from coconut.training import MultimodalCoTTrainer

    model = MultimodalCoconut.from_pretrained(config.load_model_path or config.model_id, config)
    processor = processor if model.tokens_per_patch else None
    return MultimodalCoTTrainer(model, tokenizer, processor, config, is_dry=is_dry)


def load_inputs(config: Config) -> tuple[Any, Any]:
    """Tokenizer and image processor; opens the data sets once, so that broken ones fail before a model is loaded."""
    from coconut.data import ImageProcessor, SampleEncoder
    from coconut.data.stage_text import build_prompt_template
    from coconut.model.loading import check_family
    from coconut.training.inputs import open_split, open_training
    from coconut.training.resume import check_start
    from coconut.training.stages import StageManager
    from coconut.utils.tokenizer import load_tokenizer

    stages, start = StageManager.from_config(config), config.load_model_path or config.model_id
    check_start(config, stages.stages)
    tokenizer = load_tokenizer(start)
    check_family(start, tokenizer)
    processor = ImageProcessor.from_config(config)
    encoder = SampleEncoder(tokenizer, processor, build_prompt_template(tokenizer, config.prompt_format), 0)
    open_training(config, stages, encoder)
    open_split(config, "val_data_path", encoder, config.max_val_samples)
    open_split(config, "test_data_path", encoder)
    return tokenizer, processor


def evaluate_only(config: Config) -> None:
    """Score a checkpoint on the test data: what `launch/evaluate.py` does, told by a configuration."""
    from coconut.evaluation.result import EvaluationOptions
    from coconut.evaluation.run import evaluate_checkpoint, find_checkpoint, plan_jobs

    checkpoint = find_checkpoint(Path(config.load_model_path or config.model_id))
    options = EvaluationOptions(batch_size=config.batch_size_eval, max_new_tokens=config.max_new_tokens)
    if config.test_data_path is None:
        raise ConfigError("only_eval needs test_data_path: the data to score the checkpoint on")
    jobs = plan_jobs(checkpoint, [Path(config.test_data_path)], config.run_dir / "eval", options)
    root = Path(config.image_root) if config.image_root else None
    results = evaluate_checkpoint(checkpoint, jobs, image_root=root, num_threads=config.num_threads)
    if os.environ.get("RANK", "0") == "0":
        print(f"{jobs[0].out}: {results[0].headline()}")


if __name__ == "__main__":
    sys.exit(main())
