"""Fits the cost model of `balance` to this machine, in about a minute, and prints it as configuration keys.

    python launch/calibrate.py --config args/X.yaml >> args/X.yaml
    python launch/calibrate.py --config args/X.yaml --seconds 120 batch_size_training=4

Times forward and backward of micro-batches of the configuration's own data and model, on one device, without DeepSpeed:
the model has to fit there with its gradients. Give a run the keys at its first start: it refuses other ones later.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.config import load_config
from coconut.types import CoconutError, ConfigError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="args/demo.yaml", help="run configuration (default: %(default)s)")
    add(
        "--seconds",
        type=float,
        default=45.0,
        help="how long to measure, 40 micro-batches at least; loading not counted (default: %(default)s)",
    )
    add("overrides", nargs="*", metavar="key=value", help="configuration keys, as for launch/train.py")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when configuration or data are at fault (one error on stderr says how)."""
    arguments = build_parser().parse_intermixed_args(argv)
    try:
        print(calibrated(arguments.config, arguments.overrides, arguments.seconds))
    except CoconutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def calibrated(config_path: str, overrides: list[str], seconds: float) -> str:
    """The keys as YAML."""
    if not 0 < seconds < 3600:
        raise ConfigError(f"--seconds is {seconds:g}; it must be more than 0 and less than 3600")
    config = load_config(config_path, overrides=overrides)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from coconut.model import MultimodalCoconut
    from coconut.training.calibrate import fit_costs, measure
    from coconut.training.preview import open_preview

    disable_progress_bar()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    config.update(deepspeed=None)  # whole weights, on this device
    preview = open_preview(config)
    model = MultimodalCoconut.from_pretrained(config.load_model_path or config.model_id, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fit = fit_costs(measure(preview, model.to(device), seconds))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return (
        f"# {name}: {fit.seconds_per_token * 1e6:.3g} microseconds a token, by {fit.n_measured} micro-batches; the\n"
        f"# time of others is predicted within {fit.error:.1%} (median), by tokens alone within "
        f"{fit.error_of_tokens:.1%}\n"
        f"cost_per_patch: {fit.cost_per_patch:.4g}\ncost_per_latent_pass: {fit.cost_per_latent_pass:.4g}"
    )


if __name__ == "__main__":
    sys.exit(main())
