"""Make a page of training runs and evaluations: tables, figures, questions with their answers.

    python launch/report.py RUN                          one run, and every evaluation below its folder
    python launch/report.py runs/demo --out docs/demo    several: runs of one method with their spread, run by run
    python launch/report.py --out OUT --run Coconut=RUN_A no-CoT=RUN_B --eval CoT=EVAL_1 Coconut=EVAL_2

OUT/index.html holds all it shows and needs no network; the figures lie beside it as PNG files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.evaluation.result import require_folder
from coconut.types import CoconutError, ConfigError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", type=Path, nargs="*", metavar="FOLDER", help="a run, or a folder of runs and evaluations")
    add("--out", type=Path, help="folder to write (default: report, in the first folder)")
    add("--run", nargs="+", default=[], metavar="[NAME=]DIR", help="run folders, named as the page shall name them")
    add("--eval", nargs="+", default=[], metavar="[NAME=]DIR", help="evaluation folders, or folders of such")
    floor = "a score that takes no skill (default: those that stand beside the data, as the arrow maze's do)"
    add("--floor", nargs="+", metavar="NAME=SHARE", help=floor)
    times = "JSON with the seconds of each part (default: the *times.json beside OUT or in a FOLDER)"
    add("--times", type=Path, metavar="FILE", help=times)
    add("--title", default="Reasoning in latent space, measured", help="of the page (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        page = make_report(arguments)
    except CoconutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {page}")
    return 0


def make_report(arguments: argparse.Namespace) -> Path:
    """Read what the arguments name, and write the page."""
    if not arguments.folders and not arguments.out:
        raise ConfigError("give a FOLDER to report on, or --out with --run and --eval")
    if arguments.out:
        require_folder(arguments.out)
    for folder in arguments.folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder")
    # matplotlib takes a second to import: not for a typing error, nor for --help.
    from coconut.evaluation.collect import find_evaluations, find_runs, name_stages, read_evaluation, read_run
    from coconut.evaluation.report import Report, find_times, read_times

    out = arguments.out or arguments.folders[0] / "report"
    runs = [read_run(path) for folder in arguments.folders for path in find_runs(folder)]
    runs += [read_run(path, name) for name, path in map(split_name, arguments.run)]
    evaluations = [read_evaluation(path) for folder in arguments.folders for path in find_evaluations(folder)]
    for name, folder in map(split_name, arguments.eval):
        # A folder without evaluations is read all the same: it says what is missing.
        evaluations += [read_evaluation(path, name) for path in find_evaluations(folder) or [folder]]
    times = arguments.times or find_times([*arguments.folders, out.parent])
    report = Report(
        title=arguments.title,
        runs=runs,
        evaluations=name_stages(evaluations),
        floors=dict(map(read_floor, arguments.floor)) if arguments.floor else None,
        times=read_times(times) if times else None,
    )
    return report.write(out)


def split_name(word: str) -> tuple[str | None, Path]:
    """NAME=DIR, or DIR alone."""
    name, equals, path = word.partition("=")
    return (name, Path(path)) if equals else (None, Path(word))


def read_floor(word: str) -> tuple[str, float]:
    """NAME=SHARE, a share between 0 and 1."""
    name, _, share = word.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not name or not 0 <= value <= 1:
        raise ConfigError(f"--floor {word}: give NAME=SHARE with a share from 0 to 1, for example chance=0.125")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
