"""Submits small runs of `slurm/coconut_stage.sh`, and reads what they left."""

from __future__ import annotations

import json
from pathlib import Path

from tests.slurm.cluster import Cluster, wait_until

TIMEOUT_S = 600
SMALL = ["stages.0.epochs=1", "epochs_per_stage=1", "stages.last.epochs=1", "samples_per_epoch=128"]
SMALL += ["global_batch_size=8", "batch_size_training=2", "max_val_samples=8", "log_every_n_steps=1"]
STEPS = 16  # of a stage


class Runs:
    """Submits runs of the small maze on two nodes, and reads what they left."""

    def __init__(self, cluster: Cluster, home: Path, full: bool) -> None:
        self.cluster, self.home, self.full = cluster, home, full
        self.last = 4 if full else 1

    def submit(self, name: str, *words: str, options: tuple[str, ...] = (), **environment: str) -> str:
        array = () if any(option.startswith("--array") for option in options) else (f"--array=0-{self.last}%1",)
        ranks = "2" if self.full else "1"
        return self.cluster.submit(
            *("--nodes=2", *array, *options, "slurm/coconut_stage.sh", "args/demo.yaml"),
            *(f"name={name}", f"max_latent_stage={self.last}", *SMALL, *words),
            cwd=self.home,
            COCONUT_RANKS_PER_NODE=ranks,
            **environment,
        )

    def folder(self, name: str) -> Path:
        return self.home / "runs" / name

    def log(self, job: str, element: int) -> str:
        path = self.home / "slurm" / "logs" / f"coconut-{job}_{element}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, last: int | None = None) -> None:
        """Wait for the end of the array; every element has to end well."""
        states = self.cluster.wait(job, TIMEOUT_S)
        logs = "\n".join(self.log(job, element) for element in states)
        assert states == dict.fromkeys(range((self.last if last is None else last) + 1), "COMPLETED"), logs[-6000:]

    def history(self, name: str) -> list[tuple[str, str]]:
        """(element, what happened), in order."""
        lines = (self.folder(name) / "slurm" / "history.tsv").read_text().splitlines()
        return [(words[1].split("_")[1], words[4]) for words in (line.split("\t") for line in lines)]

    def metrics(self, name: str, kind: str = "train") -> list[dict]:
        path = self.folder(name) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["kind"] == kind]

    def wait_for_step(self, name: str, job: str, step: int) -> None:
        def is_there() -> bool:
            assert set(self.cluster.states(job).values()) & {"RUNNING", "PENDING"}, self.history(name)
            return any(row["step"] >= step for row in self.metrics(name))

        wait_until(is_there, f"step {step} of {name}", TIMEOUT_S)

    def assert_equal(self, one: str, other: str) -> None:
        """The same losses at each step, once each, and the same weights to the last bit."""
        first, second = self.metrics(one), self.metrics(other)
        assert [(row["step"], row["loss"]) for row in first] == [(row["step"], row["loss"]) for row in second]
        weights = [(self.folder(name) / "final" / "model.safetensors").read_bytes() for name in (one, other)]
        assert weights[0] == weights[1]
