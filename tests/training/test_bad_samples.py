"""Bad samples in a run: left out alike on all ranks, named once, bounded; and nothing else about the run changes."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from coconut.data.bad_samples import BadSample
from coconut.data.shards import ShardReader
from coconut.training.bad_samples import BAD_SAMPLES_FILE, BadSampleReport
from coconut.types import DataError
from tests.training.ranks import Run, run, start

SHARDS = ("train_data_path=data/shards", "balance=cost", "samples_per_epoch=null")
STAGE_0 = ("stages.0.epochs=2", "stop_after_stage=0", "eval_every_n_epochs=9")  # 16 steps


def bad(number: int) -> BadSample:
    return BadSample("shard-000000.tar", f"k{number}", "image cannot be decoded")


class TestReport:
    def test_each_is_named_once_also_after_a_restart(self, tmp_path: Path) -> None:
        report = BadSampleReport(tmp_path, 0.02)
        report.load()
        assert report.unnamed([bad(1), bad(1), bad(2)]) == [bad(1), bad(2)]
        report.name([bad(1), bad(1)])
        with report.path.open("a") as file:
            file.write('{"split": "tra')  # killed inside a line
        again = BadSampleReport(tmp_path, 0.02)
        again.load()
        again.name([bad(1), bad(2)])
        again.name([bad(1)], "evaluation")
        rows = [json.loads(line) for line in report.path.read_text().splitlines()]
        assert [(row["split"], row["key"]) for row in rows] == [("train", "k1"), ("train", "k2"), ("evaluation", "k1")]
        assert rows[0] == {"split": "train", "shard": "shard-000000.tar", "key": "k1", "reason": bad(1).reason}

    def test_the_share_is_bounded_and_the_first_are_listed(self, tmp_path: Path) -> None:
        report = BadSampleReport(tmp_path, 0.02)
        report.name([bad(number) for number in range(30)])
        report.check(20, 0)  # 2 % of the 1000 that are seen at least
        report.check(100, 4900)
        with pytest.raises(DataError) as error:
            report.check(101, 4899)
        text = str(error.value)
        assert text.startswith("101 of 5000 samples of the train data could not be used, more than max_bad_fraction")
        assert str(bad(0)) in text and str(bad(10)) not in text and "and 20 more" in text
        assert BAD_SAMPLES_FILE in text and "raise max_bad_fraction" in text
        with pytest.raises(DataError):
            BadSampleReport(tmp_path, 0.0).check(1, 10**6)


def damage(folder: Path, index: int, how: int) -> None:
    """Overwrite a part of one sample inside its shard: a tar header after it was written, or the record or the
    picture's bytes as if they had been written so, with the right checksum."""
    reader = ShardReader(folder)
    row = reader.index.rows[index]
    path = folder / reader.index.shards[int(row["shard"])].name
    block = bytearray(path.read_bytes())
    first, size = int(row["offset"]), int(row["size"])
    members = [at for at in range(first, first + size, 512) if block[at + 257 : at + 262] == b"ustar"]
    names = {bytes(block[at : at + 100]).rstrip(b"\0").rpartition(b".")[2]: at for at in members}
    at = members[0] if how == 0 else names[b"json"] + 512 if how == 1 else names[b"png"] + 512 + 40
    block[at : at + 16] = b"\xff" * 16
    if how > 0:
        checksums = np.load(folder / "index.checksums.npy")
        checksums[index] = zlib.crc32(block[first : first + size])
        np.save(folder / "index.checksums.npy", checksums)
    path.write_bytes(block)


@pytest.fixture(scope="module")
def damaged(home: Path) -> dict[str, int]:
    """The maze's 256 training samples as shards, three of which are damaged: their keys, and where they are."""
    folder = home / "data" / "shards"
    shutil.copytree(home / "data" / "arrow_maze" / "shards" / "train", folder)
    chosen = random.Random(0).sample(range(256), 3)
    keys = {ShardReader(folder).key(index): index for index in chosen}
    for how, index in enumerate(chosen):
        damage(folder, index, how)
    return keys


@pytest.fixture(scope="module")
def unbroken(home: Path, damaged: dict[str, int]) -> Run:
    return run(home, "bad-unbroken", *SHARDS, *STAGE_0, "num_workers=1", zero="zero3")


def report_of(run_: Run) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run_.folder / BAD_SAMPLES_FILE).read_text().splitlines()]


def bad_samples_counted(run_: Run) -> int:
    """By the state of the newest checkpoint."""
    last = max((run_.folder / "checkpoints").glob("step-*"))
    return json.loads((last / "state.json").read_text())["state"]["bad_samples"]


@pytest.mark.slow
@pytest.mark.distributed
class TestRuns:
    def test_a_run_over_one_per_cent_of_damage_completes_and_names_each(
        self, home: Path, damaged: dict[str, int], unbroken: Run
    ) -> None:
        rows = report_of(unbroken)
        assert {row["key"] for row in rows} == damaged.keys()
        assert len(rows) == len(damaged), "each once, though it came in two epochs"
        assert {row["split"] for row in rows} == {"train"}
        reasons = sorted(row["reason"].split(":")[0] for row in rows)
        assert [reason.split(" at ")[0] for reason in reasons] == [
            "checksum", "image 1 of 1", "its json member is not JSON",
        ]  # fmt: skip
        last = unbroken.rows()[-1]
        assert last["samples"] == 2 * (256 - 3)
        assert np.isfinite([row["loss"] for row in unbroken.rows()]).all()
        assert last["loader_wait_s"] >= 0 and 0 <= last["loader_wait_share"] <= 1

    def test_one_rank_that_goes_on_leaves_out_the_same_and_learns_the_same(
        self, home: Path, damaged: dict[str, int], unbroken: Run
    ) -> None:
        """From step 1 on: how samples are packed is decided at the first start, by the ranks it had."""
        run(home, "bad-alone", *SHARDS, *STAGE_0, "max_steps=1", zero="zero3")
        alone = run(home, "bad-alone", *SHARDS, *STAGE_0, ranks=1, zero="zero3")
        assert [row["samples"] for row in alone.rows()] == [row["samples"] for row in unbroken.rows()]
        assert [row["loss"] for row in alone.rows()] == pytest.approx([r["loss"] for r in unbroken.rows()], rel=1e-5)
        assert {row["key"] for row in report_of(alone)} == damaged.keys()
        assert len(report_of(alone)) == len(damaged)

    def test_past_the_limit_all_ranks_stop_and_counting_goes_on_after_a_resume(
        self, home: Path, damaged: dict[str, int]
    ) -> None:
        limit = "max_bad_fraction=0.0045"  # 4 of the least 1000: the first epoch has 3, the second reaches 5
        stopped = run(home, "bad-limit", *SHARDS, *STAGE_0, "max_steps=8")
        assert bad_samples_counted(stopped) <= 3
        going_on = start(home, "bad-limit", *SHARDS, *STAGE_0, limit)
        assert going_on.finish() == [2, 2]
        for text in ("could not be used, more than max_bad_fraction = 0.0045", "mend the data", *damaged):
            assert text in going_on.text
        assert len(report_of(going_on)) == 3
        assert bad_samples_counted(going_on) == 4, "the checkpoint is of the step before the one that was too many"
        finished = run(home, "bad-limit", *SHARDS, *STAGE_0)
        assert finished.rows()[-1]["samples"] == 2 * (256 - 3)
        assert bad_samples_counted(finished) == 2 * 3
