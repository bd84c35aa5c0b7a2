"""Say what a run will need before it starts: memory of a rank by part, tokens a step, steps an epoch, arithmetic.

    python launch/plan.py args/X.yaml --ranks 8 --deepspeed ds_configs/zero3.json
    python launch/plan.py args/large.yaml --ranks 64 --deepspeed ds_configs/zero3.json --model internvl3-38b

Computed, not measured: the model is built without weights (torch's meta device), and its forward and backward are run
on tensors without values. With --model, a published shape, neither checkpoint nor data are needed; the sample is then
what --tiles, --text and --labels say. Exit code 1 where a rank needs more than --memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.config import Config, load_config
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
        for name in ("ranks", "text", "labels"):
            if getattr(arguments, name) < 1:
                raise ConfigError(f"--{name} is {getattr(arguments, name)}; give a number of at least 1")
        if arguments.labels > arguments.text:
            raise ConfigError(f"--labels is {arguments.labels}; they are part of --text, {arguments.text}")
        config = load_config(arguments.config, validate=arguments.model is None, overrides=overrides)
        return plan(config, arguments)
    except (CoconutError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan(config: Config, arguments: argparse.Namespace) -> int:
    """Compute and print."""
    # These take seconds to import: not for a typing error, nor for --help.
    import torch

    from coconut.config.deepspeed import batch_geometry, resolve_ds_config
    from coconut.training.plan_data import assumed_data_shape, read_data_shape
    from coconut.training.preview import open_preview
    from coconut.training.run_plan import PlannedModel, ZeroSettings, plan_text, plan_work
    from coconut.training.simulation import outline_model
    from coconut.training.stages import StageManager

    ranks, geometry = arguments.ranks, batch_geometry(config, arguments.ranks)
    if arguments.model is None:
        opened = open_preview(config)
        hf_config, data = opened.model_config, read_data_shape(opened, ranks)
    else:
        from coconut.model.presets import preset_config

        hf_config = preset_config(arguments.model)
        stages = StageManager.from_config(config)
        latents = max(stages.spec(stage).n_latents for stage in stages.stages)
        tiles = arguments.tiles
        if tiles is None:
            tiles = config.max_num_patches + config.use_thumbnail if config.dynamic_preprocess else 1
        columns = hf_config.image_seq_length * tiles + arguments.text
        data = assumed_data_shape(geometry, columns, arguments.labels, tiles, latents)
    model = outline_model(hf_config)
    resolved = resolve_ds_config(config, world_size=ranks, hidden_size=model.hidden_size)
    zero = ZeroSettings.from_ds_config(resolved)
    planned = PlannedModel(
        model,
        data.largest,
        dtype=getattr(torch, config.dtype),
        checkpointing=config.gradient_checkpointing,
        on_cpu=arguments.cpu,
    )
    memory = planned.memory(ranks, zero)
    work = plan_work(hf_config, geometry.samples, data, checkpointing=config.gradient_checkpointing)
    print(plan_text(model, memory, work, data, ranks, zero, arguments.memory))
    return 0 if memory.total <= arguments.memory * 1e9 else 1


if __name__ == "__main__":
    sys.exit(main())
