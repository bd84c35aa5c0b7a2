"""What is wrong with a loss, and what ranks do about it together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coconut.config import Config
from coconut.training.anomalies import WINDOW, judge_loss, remember
from coconut.training.memory import explaining_memory, is_out_of_memory, remedies
from coconut.training.state import TrainState
from coconut.training.watchdog import EXIT_HANG, Watchdog
from coconut.types import Batch, TrainingError
from tests.training.ranks import run, start


class TestJudgement:
    calm = [2.0, 2.1] * 8

    def test_what_is_not_finite_is_always_wrong(self) -> None:
        assert judge_loss(float("nan"), [], None) == judge_loss(float("inf"), self.calm, 10.0) == "non-finite loss"

    def test_a_spike_is_measured_by_deviation_and_by_a_least_rise(self) -> None:
        assert judge_loss(3.2, self.calm, 10.0) == "loss spike (3.2, after 2.05 ± 0.05)"
        assert judge_loss(3.0, self.calm, 10.0) is None  # 19 deviations, but less than 1 above
        assert judge_loss(5.0, [1.0, 3.0] * 8, 10.0) is None  # 3 above, but 3 deviations
        assert judge_loss(1e6, self.calm, None) is None

    def test_a_stage_begins_without_judgement(self) -> None:
        assert judge_loss(99.0, self.calm[:15], 10.0) is None
        state = TrainState(recent_losses=[*self.calm])
        state.next_stage()
        assert judge_loss(99.0, state.recent_losses, 10.0) is None

    def test_the_window_is_bounded(self) -> None:
        recent: list[float] = []
        for number in range(100):
            remember(float(number), recent)
        assert len(recent) == WINDOW and recent[-1] == 99.0


def test_memory_errors_are_told_from_others_and_answered_by_what_is_not_set_yet() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert any("gradient_checkpointing=true" in text for text in remedies(Config()))
    batch = Batch({"input_ids": torch.zeros(6, 9, dtype=torch.long)}, (), 0)
    assert any("batch_size_training=3 (this micro-batch has 6" in text for text in remedies(Config(), batch))
    assert any("gradient_accumulation_steps=2" in text for text in remedies(Config(), batch))
    saving = Config({"gradient_checkpointing": True, "bf16": True, "batch_size_eval": 1, "max_num_patches": 1})
    assert [text.split()[0] for text in remedies(saving)] == ["--deepspeed"]
    # What belongs to a run cannot be changed when it goes on.
    assert next(text.split("=")[0] for text in remedies(Config()) if "another name" in text) == "bf16"


def test_memory_that_runs_out_between_steps_is_explained_too_and_once(tmp_path: Path) -> None:
    watchdog, config = Watchdog(None, tmp_path), Config({"batch_size_eval": 8})
    watchdog.enter("validating", ["a", "b"])
    says = pytest.raises(TrainingError, match=r'"validating" of samples a, b\. CUDA out of memory')
    with says as outer, explaining_memory(watchdog, config):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "batch_size_eval=4 (now 8), if it was validating" in str(outer.value)
    with pytest.raises(TrainingError) as again, explaining_memory(watchdog, config):
        raise outer.value
    assert again.value is outer.value


STAGE_0 = ("stop_after_stage=0", "stages.0.epochs=6", "eval_every_n_epochs=9")  # 24 steps


@pytest.mark.slow
@pytest.mark.distributed
class TestRuns:
    """Two ranks, and a fault in one of them."""

    @pytest.mark.parametrize("zero", ["zero2", "zero3"])
    @pytest.mark.parametrize(("kind", "said"), [("nan", "non-finite loss"), ("gradient", "non-finite gradient")])
    def test_all_ranks_skip_a_bad_step_together(self, home, zero, kind, said) -> None:
        name = f"skip-{kind}-{zero}"
        run_ = run(home, name, "stop_after_stage=1", zero=zero, fault=f"{kind}@1:5")
        (row,) = run_.rows("anomaly")
        assert (row["step"], row["fault"]) == (6, said)
        assert set(row["ranks"]) == {"0", "1"} and len(row["ranks"]["1"]["keys"]) == 16
        losses = [row["loss"] for row in run_.rows()]
        assert len(losses) == 8 and losses[5] is None and None not in losses[:5] + losses[6:]
        assert "NaN" not in (run_.folder / "metrics.jsonl").read_text()

    def test_a_spike_is_skipped(self, home) -> None:
        run_ = run(home, "spike", *STAGE_0, fault="spike@0:20")
        (row,) = run_.rows("anomaly")
        assert row["step"] == 21 and row["fault"].startswith("loss spike")

    def test_three_in_a_row_roll_back_and_pass_over_the_data(self, home) -> None:
        run_ = run(home, "rollback", *STAGE_0, "save_every_n_steps=6", fault="nan@1:9,10,11")
        assert [(row["step"], row["fault"]) for row in run_.rows("anomaly")] == [
            *((step, "non-finite loss") for step in (10, 11, 12)),
            (12, "rollback"),
        ]
        assert run_.rows("anomaly")[-1]["to_step"] == 6
        assert [row["step"] for row in run_.rows()] == list(range(1, 25))
        losses = [row["loss"] for row in run_.rows()]
        assert losses[12] > losses[8]  # older weights
        again = run(home, "rollback", *STAGE_0, "stop_after_stage=1")
        assert len(again.rows("anomaly")) == 4

    def test_a_run_that_keeps_failing_says_what_was_seen(self, home) -> None:
        steps = ",".join(map(str, range(7, 24)))
        run_ = start(home, "hopeless", *STAGE_0, "save_every_n_steps=6", "max_rollbacks=1", fault=f"nan@1:{steps}")
        assert run_.finish() == [2, 2]
        print(f"TOOK giving up: {run_.seconds_since_fault():.1f} s")
        assert "error: 3 steps in a row were skipped, after 1 rollback(s) (max_rollbacks = 1)" in run_.text
        assert "step 13: non-finite loss; rank 0: loss sum " in run_.text and "rank 1: loss sum nan over " in run_.text

    def test_without_a_checkpoint_there_is_nothing_to_go_back_to(self, home) -> None:
        run_ = start(home, "early", *STAGE_0, "max_skipped_steps=1", fault="nan@0:2")
        assert run_.finish() == [2, 2]
        assert "there is no checkpoint to go back to" in run_.text

    def test_a_stuck_rank_is_named_and_all_end(self, home) -> None:
        run_ = start(home, "stuck", *STAGE_0, "hang_timeout_s=6", fault="stuck@1:4")
        assert EXIT_HANG in run_.finish(60)
        print(f"TOOK stuck rank, hang_timeout_s=6: {run_.seconds_since_fault():.1f} s")
        text = (run_.folder / "hang-rank-1.txt").read_text()
        assert "no progress for" in text and 'after step 4, in "forward and backward" of samples ' in text
        assert "faults.py" in text and "_stuck" in text  # the line where it hangs

    def test_a_dead_rank_ends_the_run_and_it_goes_on(self, home) -> None:
        run_ = start(home, "dead", *STAGE_0, "save_every_n_steps=6", fault="die@1:8")
        codes = run_.finish(60)
        assert codes[1] == -9 and codes[0] != 0
        print(f"TOOK dead rank: {run_.seconds_since_fault():.1f} s")
        again = run(home, "dead", *STAGE_0, "save_every_n_steps=6")
        assert [row["step"] for row in again.rows()] == list(range(1, 25))

    def test_out_of_memory_says_where_and_what_would_help(self, home) -> None:
        run_ = start(home, "memory", *STAGE_0, fault="memory@*:3")
        assert set(run_.finish()) == {2}
        print(f"TOOK out of memory: {run_.seconds_since_fault():.1f} s")
        assert 'after step 3, in "forward and backward" of samples ' in run_.text
        assert "the micro-batch is 16 samples x " in run_.text and "image patches 16 x 3 x 112 x 112" in run_.text
        assert "gradient_checkpointing=true" in run_.text
        assert "batch_size_training=8 (this micro-batch has 16 samples)" in run_.text
