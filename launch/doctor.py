"""Examine this machine: can it train? Says what is wrong and how to mend it; exit code 1 when something is.

    python launch/doctor.py                                  this machine: imports, and an all-reduce of two ranks
    python launch/doctor.py --quick --run RUN --ranks 8 --gpus 8     in a second or two: what a job does on every node
    python launch/doctor.py --json > doctor.json             the same for a program to read

A line is OK, WARN (works, but badly or in part) or FAIL. Quick means: versions are read from the packages' metadata,
nothing is imported, no rank is started.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from launch import doctor_checks as look
from launch.doctor_checks import Concern, Fault


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="import no library and start no rank")
    add("--json", action="store_true", help="print a JSON object in place of lines")
    add("--run", type=Path, default=Path("runs"), help="folder that must be writable (default: %(default)s)")
    add("--ranks", type=int, default=1, help="ranks that shall run on this machine (default: 1)")
    add("--gpus", type=int, default=0, help="GPUs that must be visible (default: 0, none needed)")
    add("--min-free-gb", type=float, default=1.0, help="least free space for --run, in GB (default: 1)")
    add("--timeout", type=float, default=180.0, help="seconds for the all-reduce of two ranks (default: 180)")
    add("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.as_rank:
        look.be_a_rank()
        return 0
    found = []
    # What libraries print while they are imported must not stand between the lines of a JSON object.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        for name, check in checks(arguments):
            level, text = examine(check)
            found.append({"name": name, "level": level, "text": text})
            if not arguments.json:
                print(f"  {level:<4}  {name}: {text}", flush=True)
    faults, concerns = (sum(one["level"] == level for one in found) for level in ("FAIL", "WARN"))
    if arguments.json:
        print(json.dumps({"host": socket.gethostname(), "ok": not faults, "checks": found}, indent=2))
    else:
        warned = f", {concerns} warning(s)" if concerns else ""
        print(f"doctor: {f'{faults} fault(s)' if faults else 'all is well'}{warned} on {socket.gethostname()}")
    return 1 if faults else 0


def examine(check: Callable[[], str]) -> tuple[str, str]:
    """OK, WARN or FAIL, and what there is to say."""
    try:
        return "OK", check()
    except Concern as concern:
        return "WARN", str(concern)
    except Fault as fault:
        return "FAIL", str(fault)
    except Exception as error:  # of a library that is broken in a way nobody thought of
        return "FAIL", f"could not be examined ({type(error).__name__}: {error})"


def checks(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every check with its name, the quick ones first."""
    least, is_full = look.requirements("dependencies"), not arguments.quick
    yield "python", look.check_python
    for package in look.IMPORTED:
        yield package, partial(look.check_package, package, least[package], is_full)
    yield "torch and torchvision", look.check_torch_pair
    yield "other packages", look.check_others
    yield "optional packages", look.check_extras
    yield "run folder", lambda: look.check_folder(arguments.run, arguments.min_free_gb)
    yield "temporary folder", lambda: look.check_folder(Path(tempfile.gettempdir()), 0.1)
    yield "shared memory", lambda: look.check_shared_memory(arguments.ranks)
    yield "processors", lambda: look.check_processors(arguments.ranks)
    yield "open files", look.check_open_files
    yield "GPUs", lambda: look.check_gpus(arguments.gpus, arguments.ranks)
    yield "compilers", look.check_compilers
    yield "native builds", look.check_builds
    if is_full:
        yield "CUDA compiler", look.check_cuda_compiler
        yield "accelerator", look.check_accelerator
        yield "communication", look.check_backends
        yield "DeepSpeed operators", look.check_ops
        yield "all-reduce of two ranks", lambda: look.check_two_ranks(arguments.timeout)


if __name__ == "__main__":
    sys.exit(main())
