"""The whole demo: make the data, train, evaluate, report. `bash launch/demo.sh` installs what is missing, then this.

    data -> Coconut, stage by stage -> no-CoT, as many steps -> evaluations -> report

of the arrow maze or, with --task prosqa, of a small ProsQA: graphs told in words, no picture.

    OUT/model/            the tiny model that every run starts from (no_cot_deep: OUT/model_deep/)
    OUT/pretrained/       of ProsQA: that model after learning to read its context; every run starts from its end
    OUT/coconut/          Coconut's run folder; stage_0 is the CoT model, final the one that thinks in latent space
    OUT/no_cot_lr.../     answers without reasoning
    OUT/METHOD/           further methods, where --methods asks for them (docs/methods.md)
    OUT/eval/             one folder an evaluation
    OUT/report/           the page and its figures
    OUT/demo_times.json   wall time of each part

Each part is a command a user could type, and is printed as such. What is complete is skipped, and a training run
that was stopped goes on, so the demo may be started again at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.evaluation.result import require_folder
from coconut.types import ConfigError
from launch.demo_tasks import DEEP_NO_COT, OTHER_METHODS, SINGLE_STAGE, TASKS, Task

CPU_RANKS = 2
#: Overrides of the configuration that leave of each stage a minute's smoke test.
QUICK = (
    "samples_per_epoch=320",
    "epochs_per_stage=1",
    "stages.0.epochs=1",
    "stages.last.epochs=1",
    "max_val_samples=40",
    "warmup_steps=5",
    "log_every_n_steps=2",
)


class PartError(Exception):
    """A command of the demo ended with an error; its own message is on the screen or in a log file."""


class Demo:
    """The parts, in order; each may be called again.

    Args:
        task: what is learned.
        out: folder of everything that this demo makes, data apart.
        seed: of the model's first weights, the order of the data and the stage mixing.
        quick: train and evaluate a little of everything, to see that it runs.
        no_cot_rates: learning rates tried without reasoning; the run that does best on validation data is evaluated.
        methods: further ones to train, as the configuration spells them.
        n_gpus: GPUs of this machine; 0 trains on CPUs.
        ranks: of each training.
        deepspeed: configuration of the engine, of each training.
    """

    def __init__(
        self,
        task: Task,
        out: Path,
        seed: int,
        quick: bool,
        no_cot_rates: Sequence[float],
        methods: Sequence[str],
        n_gpus: int,
        ranks: int,
        deepspeed: Path,
    ) -> None:
        self.task = task
        self.out = out
        self.seed = seed
        self.quick = quick
        self.n_gpus = n_gpus
        self.ranks = ranks
        self.deepspeed = deepspeed
        self.coconut = out / "coconut"
        self.no_cot = {rate: out / f"no_cot_lr{rate:g}" for rate in no_cot_rates}
        self.others = {method: out / method for method in methods}
        self.times_file = out / "demo_times.json"

    def claim_folder(self) -> None:
        """What is complete is taken over, so a folder belongs to one task and seed, at one length."""
        marker = self.out / "demo.json"
        ours = {"task": self.task.name, "seed": self.seed, "quick": self.quick}
        if marker.exists() and (found := json.loads(marker.read_text())) != ours:
            raise PartError(f"{self.out} holds a demo with {found}, not {ours}: give another --out")
        require_folder(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(ours) + "\n")

    def make_data(self) -> None:
        with self._timed("data"):
            for command in self.task.data_commands(ROOT):
                self._run(*command)
            self._run(*self.task.model_command(self.out / "model", self.task.layers, self.seed))
            if DEEP_NO_COT in self.others:
                self._run(*self.task.model_command(self.out / "model_deep", self.task.deep_layers, self.seed))

    def pretrain(self) -> None:
        """What a model that is not made of random weights could do already."""
        if self.task.pretraining is None:
            return
        for model in ("model", *(["model_deep"] if DEEP_NO_COT in self.others else [])):
            run = self._pretrained(model)
            self._train(run, f"training, {run.name}", ["method=cot"], self.out / model, self.task.pretraining)

    def _pretrained(self, model: str) -> Path:
        return self.out / model.replace("model", "pretrained")

    def _start(self, deep: bool = False) -> Path:
        """The model that a run starts from."""
        model = "model_deep" if deep else "model"
        return self.out / model if self.task.pretraining is None else self._pretrained(model) / "final"

    def train_coconut(self) -> None:
        self._train(self.coconut, "training, Coconut", ["method=coconut"])

    def train_no_cot(self) -> None:
        steps, epochs = spent(self.coconut / "metrics.jsonl")
        for rate, run in self.no_cot.items():
            settings = ["method=no_cot", f"learning_rate={rate:g}", "uniform_prob=0", "advance_at=null"]
            # As many epochs as Coconut took in all its stages are as many samples and optimizer steps.
            self._train(run, f"training, no-CoT, {rate:g}", [*settings, f"num_epochs={epochs}", f"max_steps={steps}"])

    def train_others(self) -> None:
        steps, epochs = spent(self.coconut / "metrics.jsonl")
        for method, run in self.others.items():
            settings = [f"method={'no_cot' if method == DEEP_NO_COT else method}"]
            if method == "icot":
                settings.append(f"icot_tokens={self.task.step_tokens}")
            if method.startswith("pause"):
                settings.append("latent_feedback=hidden")  # nothing is fed back
            if method in SINGLE_STAGE:  # as long as Coconut's stages together
                settings += ["uniform_prob=0", "advance_at=null", f"num_epochs={epochs}", f"max_steps={steps}"]
            self._train(run, f"training, {method}", settings, self._start(method == DEEP_NO_COT))

    def evaluate(self) -> dict[str, Path]:
        """Test data as it is, with images shuffled, with noise for thoughts; and, in the maze, paths that are new.

        Returns:
            the folder of each method's evaluations.
        """
        best = max(self.no_cot.values(), key=lambda run: validated(run / "metrics.jsonl"))
        checkpoints = {"CoT": self.coconut / "stage_0", "no-CoT": best / "final", "Coconut": self.coconut / "final"}
        names = {"CoT": "cot", "no-CoT": best.name, "Coconut": "coconut"}
        for method, run in self.others.items():
            checkpoints[method], names[method] = run / "final", method
        folders = {method: self.out / "eval" / name for method, name in names.items()}
        todo = [method for method, folder in folders.items() if not is_newer(folder / "done", checkpoints[method])]
        if todo:
            # Starting up takes longer than answering: two at a time on two cores. On a GPU one after the other.
            with self._timed("evaluation"), ThreadPoolExecutor(1 if self.n_gpus else CPU_RANKS) as pool:
                for lines in pool.map(lambda method: self._evaluate(folders[method], checkpoints[method]), todo):
                    print(lines, flush=True)
        return folders

    def report(self, evaluations: Mapping[str, Path]) -> Path:
        page = self.out / "report" / "index.html"
        several = len(self.no_cot) > 1
        runs = {"Coconut": self.coconut}
        runs |= {f"no-CoT, {rate:g}" if several else "no-CoT": run for rate, run in self.no_cot.items()}
        runs |= self.others
        with self._timed("report"):
            self._run(
                *("launch/report.py", "--out", page.parent, "--times", self.times_file),
                *("--run", *(f"{name}={run}" for name, run in runs.items())),
                *("--eval", *(f"{method}={folder}" for method, folder in evaluations.items())),
            )
        return page

    # -- how --

    def _train(
        self, run: Path, part: str, overrides: Sequence[str], model: Path | None = None, config: str | None = None
    ) -> None:
        if is_whole(run):
            print(f"{part}: there already ({run / 'final'})", flush=True)
            return
        with self._timed(part):
            self._run(
                *("deepspeed", "--num_gpus", self.ranks),
                *("--master_port", free_port(), "launch/train.py"),
                *("--deepspeed", self.deepspeed, "--config", config or self.task.config),
                *(f"save_path={run.parent}", f"name={run.name}", f"seed={self.seed}"),
                f"model_id={model or self._start()}",
                # The test data is scored once, by the evaluation.
                *("test_data_path=null", *(QUICK if self.quick else ()), *overrides),
            )
        if not is_whole(run):  # a stop that was asked for is no error of the command
            raise PartError(f"{part} was stopped before its end ({run / 'log.txt'} says where); it goes on from there")

    def _evaluate(self, folder: Path, checkpoint: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        with log.open("w") as output:
            self._run(
                *("launch/evaluate.py", "--checkpoint", checkpoint, "--out", folder, "--controls"),
                *("--data", *self.task.tests),
                *("--max-new-tokens", self.task.max_new_tokens, *(["--limit", 100] if self.quick else [])),
                output=output,
                log=log,
            )
        (folder / "done").touch()
        return "\n".join(line for line in log.read_text().splitlines() if line.startswith(str(folder)))

    def _run(self, *words: object, output: object = None, log: Path | None = None) -> None:
        command = [str(word) for word in words]
        if command[0].endswith(".py"):
            command.insert(0, "python")
        print(f"\n$ {shlex.join(command)}", flush=True)
        # Of this environment, activated or not: python, deepspeed, and the ninja that DeepSpeed may call.
        programs = Path(sys.executable).parent
        environment = os.environ | {"PATH": os.pathsep.join([str(programs), os.environ.get("PATH", "")])}
        command[0] = str(programs / command[0])
        if not self.n_gpus:
            environment |= {
                "OMP_NUM_THREADS": "1"
            }  # as many threads as cores between two ranks only wait for each other
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output)  # type: ignore[call-overload]
        if done.returncode:
            raise PartError(
                f"{shlex.join(command[:4])} ... ended with {done.returncode}" + (f"; see {log}" if log else "")
            )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the wall time of a part to what earlier starts of the demo spent on it."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add_time(part, time.perf_counter() - begin)

    def add_time(self, part: str, seconds: float) -> None:
        times = json.loads(self.times_file.read_text()) if self.times_file.exists() else {}
        times[part] = round(times.get(part, 0.0) + seconds, 1)
        self.times_file.parent.mkdir(parents=True, exist_ok=True)
        self.times_file.write_text(json.dumps(times, indent=2) + "\n")


def is_whole(run: Path) -> bool:
    """Whether a training run came to its end."""
    return (run / "final" / "coconut.json").exists()


def spent(metrics: Path) -> tuple[int, int]:
    """Optimizer steps and epochs of a finished run, from its metrics."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return max(row["step"] for row in rows), max(row["epoch"] for row in rows if row["kind"] == "stage")


def validated(metrics: Path) -> float:
    """Accuracy of the last validation of a run."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    accuracy: float = [row for row in rows if row["kind"] == "val"][-1]["accuracy"]
    return accuracy


def is_newer(result: Path, source: Path) -> bool:
    """Whether a result is there, and was made of what the source folder holds now."""
    return result.exists() and result.stat().st_mtime > source.stat().st_mtime


def free_port() -> int:
    """A port for the ranks to meet at, so that two demos may run on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; give a whole number of at least {least}")
        return int(text)

    return read


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="arrow-maze", help="default: %(default)s")
    folder = "folder to write (default: runs/demo/seed_SEED or runs/prosqa/..., with --quick runs/demo_quick/...)"
    parser.add_argument("--out", type=Path, help=folder)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights and data order (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of every part: shows that it runs, learns nothing"
    )
    rates = "learning rates tried for no-CoT; the best on validation data is evaluated (default: %(default)s)"
    parser.add_argument("--no-cot-lr", type=float, nargs="+", default=[1e-3], metavar="RATE", help=rates)
    processes = f"processes that train together (default: one a GPU, or {CPU_RANKS} on CPUs)"
    parser.add_argument("--ranks", type=at_least(1), help=processes)
    engine = "DeepSpeed configuration; zero1.json is twice as fast on one rank (default: %(default)s)"
    parser.add_argument("--deepspeed", type=Path, default=Path("ds_configs/zero3.json"), metavar="FILE", help=engine)
    also = "further methods to train beside Coconut, CoT and no-CoT (docs/methods.md); all of them, if none is named"
    parser.add_argument("--methods", nargs="*", choices=sorted(OTHER_METHODS), metavar="METHOD", default=(), help=also)
    parser.add_argument("--setup-seconds", type=float, default=0.0, help=argparse.SUPPRESS)  # demo.sh measures it
    arguments = parser.parse_args(argv)
    if not (ROOT / arguments.deepspeed).is_file():
        choices = ", ".join(sorted(path.name for path in (ROOT / "ds_configs").glob("*.json")))
        parser.error(f"--deepspeed {arguments.deepspeed} is no file; ds_configs/ has {choices}")
    task = TASKS[arguments.task]
    default = ROOT / "runs" / f"{task.name}{'_quick' if arguments.quick else ''}" / f"seed_{arguments.seed}"
    out = (arguments.out or default).resolve()
    n_gpus = count_gpus()
    ranks = arguments.ranks or n_gpus or CPU_RANKS
    methods = list(OTHER_METHODS) if arguments.methods == [] else arguments.methods
    demo = Demo(
        task, out, arguments.seed, arguments.quick, arguments.no_cot_lr, methods, n_gpus, ranks, arguments.deepspeed
    )
    try:
        demo.claim_folder()
        demo.add_time("set-up", arguments.setup_seconds)
        demo.make_data()
        demo.pretrain()
        demo.train_coconut()
        demo.train_no_cot()
        demo.train_others()
        page = demo.report(demo.evaluate())
    except (PartError, ConfigError) as error:
        print(f"\ndemo stopped: {error}. Mend it and start again: what is done is kept.", file=sys.stderr)
        return 1
    times = json.loads(demo.times_file.read_text())
    print("\nwall time:")
    for part, seconds in times.items():
        print(f"  {part:20} {seconds / 60:6.1f} min")
    print(f"  {'total':20} {sum(times.values()) / 60:6.1f} min   ({demo.times_file})")
    print(f"\nreport: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
