"""The demo's order of things, with training and evaluation replaced by their outcome: a few files."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "demo.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: Validation accuracy that the run without reasoning reaches at each learning rate.
VALIDATED = {"0.0003": 0.2, "0.001": 0.3, "0.002": 0.25}


@pytest.fixture
def start(script, tmp_path, monkeypatch, capsys):
    """Starts the demo with given arguments; returns its exit status and the commands it gave, as lists of words."""
    given = []

    def fake_run(self, *words, output=None, log=None):
        words = [str(word) for word in words]
        given.append(words)
        if getattr(self, "fail_at", None) and self.fail_at in words:
            raise script.PartError("said no")
        settings = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
        if "launch/train.py" in words:
            run = Path(settings["save_path"]) / settings["name"]
            stages = ["final", "stage_0"]
            if getattr(self, "stop_at", None) in words:  # as by `touch RUN/stop`, in stage 0
                return
            for stage in stages:
                (run / stage).mkdir(parents=True)
                (run / stage / "coconut.json").write_text("{}")
                os.utime(run / stage, (1, 1))
            rows = [
                {"kind": "val", "step": 400, "epoch": 2, "accuracy": VALIDATED.get(settings.get("learning_rate"), 1.0)},
                {"kind": "train", "step": 780, "epoch": 4},
                {"kind": "stage", "step": 785, "epoch": 5},
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if "launch/evaluate.py" in words:
            output.write(f"{words[words.index('--out') + 1]}/test: accuracy 97 %\n")
            output.flush()

    monkeypatch.setattr(script.Demo, "_run", fake_run)
    monkeypatch.setattr(script, "count_gpus", lambda: 0)

    def start(*arguments):
        given.clear()
        status = script.main(["--out", str(tmp_path / "out"), *arguments])
        return status, list(given)

    return start


def programs(commands):
    return [next(word for word in words if word.startswith("launch/")) for words in commands]


def test_everything_in_order(start, tmp_path, capsys):
    status, commands = start("--seed", "3", "--setup-seconds", "12")
    assert status == 0
    train, evaluate = "launch/train.py", "launch/evaluate.py"
    assert programs(commands) == ["launch/prepare_data.py", train, train, *[evaluate] * 3, "launch/report.py"]
    coconut, no_cot = commands[1], commands[2]
    assert coconut[:3] == ["deepspeed", "--num_gpus", "2"]
    assert {"seed=3", "method=coconut", f"model_id={tmp_path / 'out' / 'model'}", "test_data_path=null"} <= set(coconut)
    # no-CoT gets as many steps and samples as Coconut took, and no target ends it earlier.
    assert {"seed=3", "method=no_cot", "max_steps=785", "num_epochs=5", "advance_at=null"} <= set(no_cot)
    assert all("--controls" in words and "data/arrow_maze/shards/test_paths" in words for words in commands[3:6])
    assert not any("--limit" in words for words in commands)
    times = json.loads((tmp_path / "out" / "demo_times.json").read_text())
    assert list(times) == ["set-up", "data", "training, Coconut", "training, no-CoT, 0.001", "evaluation", "report"]
    assert times["set-up"] == 12
    assert "report:" in capsys.readouterr().out.splitlines()[-1]


def test_what_is_done_is_skipped(start):
    start()
    _, commands = start()
    assert programs(commands) == ["launch/prepare_data.py", "launch/report.py"]


def test_a_new_training_run_is_evaluated_anew(start, tmp_path):
    start()
    os.utime(tmp_path / "out" / "coconut" / "final")
    final = str(tmp_path / "out" / "coconut" / "final")
    done = tmp_path / "out" / "eval" / "coconut" / "done"
    os.utime(done, (2, 2))
    _, commands = start()
    assert [words for words in commands if "launch/evaluate.py" in words and final in words]


def test_validation_chooses_the_learning_rate_of_no_cot(start, tmp_path):
    _, commands = start("--no-cot-lr", "3e-4", "1e-3", "2e-3")
    trained = [words for words in commands if "method=no_cot" in words]
    assert [next(w for w in words if w.startswith("learning_rate=")) for words in trained] == [
        f"learning_rate={rate}" for rate in VALIDATED
    ]
    evaluated = [words[words.index("--checkpoint") + 1] for words in commands if "launch/evaluate.py" in words]
    assert str(tmp_path / "out" / "no_cot_lr0.001" / "final") in evaluated
    assert len(evaluated) == 3


def test_quick_shortens_training_and_evaluation(start):
    _, commands = start("--quick")
    assert all("epochs_per_stage=1" in words for words in commands if "launch/train.py" in words)
    assert all("--limit" in words for words in commands if "launch/evaluate.py" in words)


def test_a_failing_part_stops_the_demo_and_says_so(script, start, monkeypatch, capsys):
    monkeypatch.setattr(script.Demo, "fail_at", "method=no_cot", raising=False)
    status, commands = start()
    assert status == 1
    assert "method=no_cot" in commands[-1]
    assert "what is done is kept" in capsys.readouterr().err
    monkeypatch.setattr(script.Demo, "fail_at", None, raising=False)
    status, commands = start()
    assert status == 0
    assert not any("method=coconut" in words for words in commands)


def test_a_training_that_is_stopped_stops_the_demo_which_goes_on_when_started_again(script, start, monkeypatch, capsys):
    monkeypatch.setattr(script.Demo, "stop_at", "method=coconut", raising=False)
    status, commands = start()
    assert status == 1
    assert "method=coconut" in commands[-1]
    assert "demo stopped: training, Coconut was stopped before its end" in capsys.readouterr().err
    monkeypatch.setattr(script.Demo, "stop_at", None)
    status, commands = start()
    assert status == 0 and any("method=coconut" in words for words in commands)


def test_a_command_that_fails_is_an_error(script, tmp_path, monkeypatch):
    demo = script.Demo(
        script.TASKS["arrow-maze"], tmp_path, 0, False, [1e-3], [], n_gpus=0, ranks=2, deepspeed=Path("zero3.json")
    )
    with pytest.raises(script.PartError, match="ended with 2"):
        demo._run("launch/prepare_data.py", "no-such-data-set")


def test_a_folder_belongs_to_one_seed_at_one_length(start, capsys):
    start("--quick")
    assert start("--quick")[0] == 0
    for arguments in (["--quick", "--seed", "1"], []):
        status, commands = start(*arguments)
        assert status == 1 and not commands
        assert "give another --out" in capsys.readouterr().err


def test_an_engine_that_is_not_there_is_refused_before_anything_is_made(start, tmp_path, capsys):
    with pytest.raises(SystemExit):
        start("--deepspeed", "ds_configs/zero9.json")
    assert "ds_configs/zero9.json is no file; ds_configs/ has zero1.json, zero2.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_method_on_prosqa(script, start, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROOT", tmp_path)  # where no data is
    (tmp_path / "ds_configs").symlink_to(SCRIPT.parents[1] / "ds_configs")
    status, commands = start("--task", "prosqa", "--methods", "--deepspeed", "ds_configs/zero1.json")
    assert status == 0
    assert [words[1] for words in commands[:7]] == ["prosqa"] * 5 + ["decoder"] * 2
    layers = [words[words.index("--layers") + 1] for words in commands[5:7]]
    assert layers == ["3", "21"]
    for words, model in zip(commands[7:9], ("model", "model_deep"), strict=True):
        assert "args/prosqa_recite.yaml" in words and f"model_id={tmp_path / 'out' / model}" in words
    trained = [
        next(word for word in words if word.startswith("method=")) for words in commands if "launch/train.py" in words
    ]
    assert trained == ["method=cot"] * 2 + ["method=coconut", "method=no_cot"] + [
        f"method={'no_cot' if name == 'no_cot_deep' else name}" for name in script.OTHER_METHODS
    ]
    for words in commands[9:]:
        if "launch/train.py" in words:
            assert "args/prosqa_small.yaml" in words and "ds_configs/zero1.json" in words
            start_from = "pretrained_deep" if "name=no_cot_deep" in words else "pretrained"
            assert f"model_id={tmp_path / 'out' / start_from / 'final'}" in words
