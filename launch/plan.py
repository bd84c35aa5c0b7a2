"""Say what a run will need before it starts: memory of a rank by part, tokens a step, steps an epoch, arithmetic.

    python launch/plan.py args/X.yaml --ranks 8 --deepspeed ds_configs/zero3.json
    python launch/plan.py args/large.yaml --ranks 64 --deepspeed ds_configs/zero3.json --model internvl3-38b

Computed, not measured: the model is built without weights (torch's meta device), and its forward and backward are run
on tensors without values. With --model, a published shape, neither checkpoint nor data are needed; the sample is then
what --tiles, --text and --labels say. Exit code 1 where a rank needs more than --memory.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.config import Config, load_config
from coconut.config.faults import raise_faults
from coconut.types import CoconutError, ConfigError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", help="run configuration, such as args/demo.yaml")
    add("--ranks", type=int, required=True, help="ranks of the run, one a GPU")
    add("--deepspeed", metavar="FILE", help="DeepSpeed configuration, as for launch/train.py")
    add("--model", help="plan for a published shape: internvl3-1b, internvl3-8b, internvl3-38b or internvl3-78b")
    add(
        "--tiles", type=int, help="with --model: image tiles of a sample (default: as many as the configuration allows)"
    )
    add(
        "--text",
        type=int,
        default=200,
        help="with --model: tokens of a sample besides its image (default: %(default)s)",
    )
    add("--labels", type=int, default=100, help="with --model: how many of these are labels (default: %(default)s)")
    add("--memory", type=float, default=80.0, help="GB of a GPU, 10^9 bytes (default: %(default)s)")
    add("--cpu", action="store_true", help="plan for ranks that compute on a CPU")
    add("overrides", nargs="*", metavar="key=value", help="configuration keys, as for launch/train.py")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where it does not fit, 2 when configuration or data are at fault."""
    arguments = build_parser().parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.deepspeed:
        overrides.append(f"deepspeed={arguments.deepspeed}")
    try:
        check_arguments(arguments)
        config = load_config(arguments.config, validate=arguments.model is None, overrides=overrides)
        raise_faults(config.faults, config.origins)  # those that loading let pass for a published shape
        return plan(config, arguments)
    except (CoconutError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises: ConfigError: a number that cannot be planned with."""
    for name, least in (("ranks", 1), ("text", 1), ("labels", 1), ("tiles", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}; give a number of at least {least}")
    if not 0 < arguments.memory < math.inf:
        raise ConfigError(f"--memory is {arguments.memory:g}; give the GB of a GPU, a number above 0 such as 80")
    if arguments.labels > arguments.text:
        raise ConfigError(f"--labels is {arguments.labels}; they are part of --text, {arguments.text}")


def plan(config: Config, arguments: argparse.Namespace) -> int:
    """Compute and print."""
    # These take seconds to import: not for a typing error, nor for --help.
    import torch

    from coconut.config.deepspeed import batch_geometry, resolve_ds_config
    from coconut.model.adapters import LoraSettings
    from coconut.model.loading import configure
    from coconut.training.batches import stage_batch
    from coconut.training.plan_data import assumed_data_shape, read_data_shape
    from coconut.training.preview import open_preview
    from coconut.training.run_plan import PlannedModel, ZeroSettings, plan_text, plan_work
    from coconut.training.simulation import outline_model

    ranks, checkpointing = arguments.ranks, config.gradient_checkpointing
    if arguments.model is None:
        opened = open_preview(config)
        hf_config, data = opened.model_config, read_data_shape(opened, ranks)
    else:
        from coconut.model.presets import preset_config

        hf_config = preset_config(arguments.model)
        tiles = arguments.tiles
        if tiles is None:
            tiles = config.max_num_patches + config.use_thumbnail if config.dynamic_preprocess else 1
        columns = hf_config.image_seq_length * tiles + arguments.text
        data = assumed_data_shape(config, ranks, columns=columns, labels=arguments.labels, tiles=tiles)
    model = outline_model(hf_config, config.freeze, LoraSettings.from_config(config))
    if config.method.startswith("pause"):  # other ways of feeding back are planned as the paper's
        configure(model, config)
    geometry = batch_geometry(stage_batch(config, data.stages[0].stage), ranks)
    resolved = resolve_ds_config(config, world_size=ranks, hidden_size=model.hidden_size, geometry=geometry)
    zero = ZeroSettings.from_ds_config(resolved)
    planned = PlannedModel(
        model,
        *(stage.largest for stage in data.stages),
        dtype=getattr(torch, config.dtype),
        checkpointing=checkpointing,
        on_cpu=arguments.cpu,
    )
    memory = planned.memory(ranks, zero)
    work = partial(plan_work, hf_config, checkpointing=checkpointing)
    print(plan_text(model, memory, data, ranks, zero, arguments.memory, work))
    return 0 if memory.total <= arguments.memory * 1e9 else 1


if __name__ == "__main__":
    sys.exit(main())
