"""Say which folder and which stages a configuration means, one fact a line: what job scripts need to know of a run.

    python launch/stages.py --config args/demo.yaml name=mine
    run runs/mine
    last 4
    done 0 1
    resume auto
    step 1250

`done` names the finished stages, `step` the newest checkpoint's. Reads no data, loads no model, writes nothing. What is
wrong with the configuration is an error here; paths are not looked at: the run's first start may make data and model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.config import load_config
from coconut.config.faults import raise_faults
from coconut.types import CoconutError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="args/demo.yaml", help="run configuration (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, validate=False, overrides=arguments.overrides)
        raise_faults(config.faults, config.origins)
        # Imports torch, some seconds: not for a typing error.
        from coconut.training.run_folder import is_stage_done
        from coconut.training.stages import StageManager

        stages = StageManager.from_config(config).stages
    except CoconutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run_dir = Path(config.run_dir)
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    print("run", run_dir)
    print("last", stages[-1])
    print("done", *(stage for stage in stages if is_stage_done(run_dir, stage)))
    print("resume", config.resume)
    print("step", int(checkpoints[-1].removeprefix("step-")) if checkpoints else 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
