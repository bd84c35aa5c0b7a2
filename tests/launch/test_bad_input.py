"""Bad input ends `launch/train.py` with one clear error and exit code 2, before any model is loaded.

The weights of the model folder are damaged, so that reaching for them would be another error; and in this process
`from_pretrained` is replaced by one that fails the test.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coconut.utils.distributed import LAUNCHER_VARIABLES

GOOD = {"question": "start a4 ?", "steps": ["blue up a3"], "answer": "red"}
DAMAGED = b"these are no weights"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer and configuration are sound and whose weights are not."""
    from coconut.data.arrow_maze import vocabulary
    from coconut.model.tiny import build_tiny_internvl, build_word_tokenizer, save_tiny

    folder = tmp_path_factory.mktemp("bad") / "model"
    tokenizer = build_word_tokenizer(vocabulary())
    save_tiny(build_tiny_internvl(tokenizer), tokenizer, folder)
    (folder / "model.safetensors").write_bytes(DAMAGED)
    return folder


@pytest.fixture
def folder(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test puts its files; the working folder is the project's, as a user's is."""
    monkeypatch.chdir(project)
    return tmp_path


@pytest.fixture
def arguments(model: Path, folder: Path) -> list[str]:
    """A small run whose input is all right, weights apart."""
    good = write(folder / "good.json", [{**GOOD, "id": str(n)} for n in range(4)])
    return [
        f"model_id={model}",
        f"train_data_path={good}",
        "val_data_path=null",
        "test_data_path=null",
        f"save_path={folder / 'runs'}",
        "advance_at=null",
        "max_steps=1",
    ]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Runs `launch/train.py` in this process and gives back its error message."""
    from coconut.model import MultimodalCoconut
    from coconut.utils.distributed import shutdown_distributed
    from launch.train import main

    def must_not_be_reached(*_: Any, **__: Any) -> None:
        pytest.fail("the model was about to be loaded")

    monkeypatch.setattr(MultimodalCoconut, "from_pretrained", must_not_be_reached)

    def run(*argv: str) -> str:
        assert main(list(argv)) == 2
        return the_error(capsys.readouterr().err)

    yield run
    shutdown_distributed()
    for name in LAUNCHER_VARIABLES:  # a run without a launcher makes them
        os.environ.pop(name, None)


def the_error(stderr: str) -> str:
    """The one error of a run: the last thing said, with nothing of Python in it."""
    assert "Traceback" not in stderr, stderr
    assert stderr.count("error:") == 1, stderr
    message = stderr[stderr.index("error:") :].rstrip("\n")
    first, *rest = message.splitlines()
    assert stderr.splitlines()[-1 - len(rest)] == first  # a line of its own
    assert all(line.startswith("  ") for line in rest), message  # further lines are a list of faults
    return message.removeprefix("error: ")


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# -- the configuration file --


def test_missing_configuration_file(fails, folder):
    message = fails("--config", "args/demmo.yaml")
    assert "args/demmo.yaml: no such configuration file" in message
    assert "args/demo.yaml" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"stages: [1\nname: x\n", "is not YAML"),
        (b"name: \xff\xfe\n", "is not text in UTF-8"),
        (b"- a\n- b\n", "must hold `key: value` lines"),
    ],
)
def test_unreadable_yaml(fails, folder, content, said):
    (folder / "c.yaml").write_bytes(content)
    message = fails("--config", str(folder / "c.yaml"))
    assert said in message and str(folder / "c.yaml") in message


def test_unknown_key_names_the_nearest(fails, arguments):
    assert fails(*arguments, "learning_rat=1e-3") == (
        "command line: learning_rat = 0.001: unknown key; did you mean learning_rate?"
    )


def test_unknown_key_of_a_file_names_its_line(fails, folder, arguments):
    path = write(folder / "c.yaml", "seed: 1\nepochs_per_stag: 2\n")
    message = fails("--config", path, *arguments)
    assert message.startswith(f"{path}:2: epochs_per_stag = 2: unknown key") and "epochs_per_stage" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("c_thought=0", "c_thought = 0: must be at least 1"),
        ("freeze=[vison]", "'vison': must be one of vision, projector, language, embeddings; did you mean vision?"),
        ("freeze=vision", "freeze = 'vision': must be a list such as [one, two]"),
        ("lora_rank=4 lora_target_modules=[q_prj]", "names q_prj, which no linear layer of Qwen2Model is called"),
        ("lora_rank=4 lora_target_modules=[]", "lora_target_modules = []: must not be empty"),
        ("lora_dropout=0.1", "lora_dropout = 0.1: without lora_rank there is no LoRA"),
        (
            "freeze=[vision,projector,language,embeddings]",
            "so nothing is left to train; leave one out, or set lora_rank",
        ),
        ("uniform_prob=1.5", "uniform_prob = 1.5: must be at most 1"),
        ("method=cott", "no_curriculum, no_thought; did you mean cot?"),
        ("start_stage=9", "start_stage is 9; it must be from 0 to max_latent_stage"),
        (
            "method=pause latent_passes=jacobi",
            "latent_passes = 'jacobi' with method = 'pause': pauses are not computed",
        ),
        ("batch_size_training=many", "batch_size_training = 'many': must be a whole number"),
    ],
)
def test_value_out_of_range_names_value_and_choices(fails, arguments, override, said):
    assert said in fails(*arguments, *override.split())


def test_all_faults_are_listed_at_once(fails, arguments):
    message = fails(*arguments, "c_thought=0", "learning_rat=1e-3", "fp16=true", "bf16=true")
    assert message.startswith("3 faults in the configuration:")
    assert all(key in message for key in ("c_thought", "learning_rat", "fp16"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train_data_path: 3", "train_data_path = 3: must be a path"),
        ("model_id: [a, b]", "model_id = ['a', 'b']: must be text"),
        ("c_thought: 0", "c_thought = 0: must be at least 1"),
    ],
)
def test_no_demo_data_is_made_for_settings_that_cannot_be_used(fails, project, folder, monkeypatch, line, said):
    monkeypatch.chdir(folder)
    path = write(folder / "c.yaml", f"base_config: {project / 'args' / 'demo.yaml'}\n{line}\n")
    message = fails("--config", path)
    assert message.startswith(f"{path}:2: {said}") and len(message.splitlines()) == 1
    assert [file.name for file in folder.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("name", ["x", "x/sub"])
def test_a_file_in_the_place_of_the_run_folder(fails, folder, arguments, name):
    write(folder / "x", "a file")
    message = fails(*arguments, f"save_path={folder / name}")
    assert message.startswith(f"command line: save_path = '{folder / name}': {folder / 'x'} is a file")


# -- the ds_config --


def test_missing_ds_config_names_those_there_are(fails, arguments):
    message = fails("--deepspeed", "ds_configs/zero4.json", *arguments)
    assert "deepspeed = 'ds_configs/zero4.json': no such file" in message and "ds_configs/zero3.json" in message


def test_ds_config_that_is_not_json(fails, folder, arguments):
    path = write(folder / "ds.json", "{")
    assert f"{path} is not valid JSON" in fails("--deepspeed", path, *arguments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"train_micro_batch_size_per_gpu": 7},
            "train_micro_batch_size_per_gpu is 7, but batch_size_training asks for",
        ),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but bf16 asks for False"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but max_grad_norm asks for 1.0"),
        ({"scheduler": {"type": "WarmupLR"}}, "it has a scheduler block; the trainer sets the learning rate"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; choose 0, 1, 2 or 3"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation is no name that DeepSpeed knows"),
        ({"optimizer": {"type": "AdamW", "params": 3}}, "optimizer.params is 3; it has to be a JSON object"),
    ],
)
def test_contradictory_ds_config(fails, folder, arguments, change, said):
    path = write(folder / "ds.json", {"zero_optimization": {"stage": 1}, **change})
    message = fails("--deepspeed", path, *arguments)
    assert said in message and path in message


# -- the data --


def test_missing_data_file(fails, folder, arguments):
    message = fails(*arguments, f"train_data_path={folder / 'nowhere.json'}")
    assert f"train_data_path = '{folder / 'nowhere.json'}': does not exist" in message
    assert "python launch/prepare_data.py" in message


def test_missing_image(fails, folder, arguments):
    path = write(folder / "d.json", [GOOD, {**GOOD, "image": "images/7.png", "id": "seven"}])
    message = fails(*arguments, f"train_data_path={path}")
    assert message == f"{path}:1: image {folder / 'images/7.png'} does not exist (is image_root right?)"


def test_damaged_image(fails, folder, arguments):
    (folder / "7.png").write_bytes(b"no picture")
    path = write(folder / "d.json", [{**GOOD, "image": "7.png"}])
    message = fails(*arguments, f"train_data_path={path}")
    assert "7.png" in message and f"{path}:0" in message


@pytest.mark.parametrize("name", ["question", "steps", "answer"])
def test_record_without_a_field(fails, folder, arguments, name):
    path = write(folder / "d.json", [GOOD, {key: value for key, value in GOOD.items() if key != name}])
    message = fails(*arguments, f"train_data_path={path}")
    assert message == f"{path}:1: field '{name}' is missing; a record needs 'question', 'steps', 'answer'"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_zero_samples_in_any_split(fails, folder, arguments, split):
    path = write(folder / "empty.json", [])
    assert f"{path} holds zero samples" in fails(*arguments, f"{split}_data_path={path}")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("d.json", "[{]", ", line 1: not JSON"),
        pytest.param("d.json", "[" * 100_000, ": nested too deeply to be a list of records", id="deep list"),
        pytest.param("d.jsonl", "[" * 100_000, ", line 1: nested too deeply to be a record", id="deep line"),
        pytest.param(
            "manifest.json", "[" * 100_000, " cannot be read: maximum recursion depth exceeded", id="deep index"
        ),
    ],
)
def test_data_that_is_not_json(fails, folder, arguments, name, text, said):
    path = write(folder / name, text)
    given = folder if name == "manifest.json" else path
    assert f"{path}{said}" in fails(*arguments, f"train_data_path={given}")


def test_more_ranks_than_samples(fails, arguments, monkeypatch):
    monkeypatch.setattr("coconut.training.inputs.get_world_size", lambda: 5)
    message = fails(*arguments)
    assert "holds 4 samples, fewer than the 5 ranks of this run" in message
    assert "give more data or start fewer ranks" in message


def test_mixtures_that_cannot_be(fails, folder, arguments):
    good = folder / "good.json"
    other = write(folder / "other.json", [GOOD])
    empty = write(folder / "empty.json", [])
    (folder / "none").mkdir()
    for mixture, said in (
        (f"{{{good}: 1, {folder / 'nowhere'}: 1}}", f"train_data_path = '{folder / 'nowhere'}': does not exist"),
        (f"{{{good}: 0, {other}: 1}}", f"gives {good} the weight 0; must be a number above 0"),
        (f"{{{good}: -2, {other}: 1}}", f"gives {good} the weight -2; must be a number above 0"),
        ("{}", "must be a path, or several with weights such as {data/a: 2, data/b: 1}"),
        (f"{{{good}: 1, {empty}: 1}}", f"{empty} holds zero samples"),
        (f"{{{good}: 1, {folder / 'none'}: 1}}", f"{folder / 'none'} has no manifest.json"),
        (f"{{{good}: 100, {other}: 1}}", f"the weight of {other}, 1 of 101, is less than one sample of an epoch of 5"),
    ):
        assert said in fails(*arguments, "samples_per_epoch=null", f"train_data_path={mixture}")


# -- model and tokenizer --


def test_model_folder_without_a_tokenizer(fails, folder, arguments):
    (folder / "empty").mkdir()
    message = fails(*arguments, f"model_id={folder / 'empty'}")
    assert f"no tokenizer can be loaded from '{folder / 'empty'}'" in message


def test_model_folder_that_is_not_there(fails, folder, arguments):
    assert f"model_id = '{folder / 'none'}': is not a folder" in fails(*arguments, f"model_id={folder / 'none'}")


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("foo", "has no readable config.json: The checkpoint you are trying to load has model type `foo`"),
        ("t5", "is of the family 't5'; supported are internvl, qwen2_5_vl, and what transformers has as a causal"),
    ],
)
def test_model_of_a_family_that_is_not_supported(fails, folder, arguments, model, monkeypatch, model_type, said):
    # transformers warns too, to the stderr that there was when it was imported: that of an earlier test, closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    shutil.copytree(model, folder / "model")
    content = json.loads((model / "config.json").read_text())
    write(folder / "model" / "config.json", {**content, "model_type": model_type})
    message = fails(*arguments, f"model_id={folder / 'model'}")
    assert message.startswith(f"model_id '{folder / 'model'}' {said}")


def test_resume_from_what_is_no_checkpoint(fails, folder, arguments):
    (folder / "empty").mkdir()
    message = fails(*arguments, f"resume={folder / 'empty'}")
    assert message.startswith(f"{folder / 'empty'} is no complete checkpoint")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stop_after_stage=9"], "stop_after_stage = 9: this run has the stages 0 to 4"),
        (["stop_after_stage=1", "method=cot"], "stop_after_stage = 1: this run has the stages 0 to 0"),
        (["stop_after_stage=0", "start_stage=1"], "stop_after_stage = 0: this run has the stages 1 to 4"),
    ],
)
def test_end_at_a_stage_that_the_run_does_not_have(fails, arguments, overrides, said):
    assert fails(*arguments, *overrides) == said


def test_checkpoint_to_score_that_is_none(fails, folder, arguments):
    message = fails(*arguments, f"test_data_path={folder / 'good.json'}", "only_eval=true")
    assert "is no checkpoint" in message


def test_the_api_refuses_a_tokenizer_without_the_special_tokens(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from coconut.data import MultimodalDataset
    from coconut.types import DataError
    from coconut.utils.tokenizer import special_token_ids

    core = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")
    for use in (
        lambda: special_token_ids(tokenizer),
        lambda: MultimodalDataset(write(folder / "d.json", [GOOD]), tokenizer, None),
    ):
        with pytest.raises(DataError, match=r"lacks <\|start-latent\|>.*coconut\.load_tokenizer, which adds them"):
            use()


# -- as a user meets them: a process of its own, the model not replaced --


def run_train(project: Path, *argv: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "launch/train.py", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


def test_a_process_ends_with_code_2_and_the_error_last(project, arguments):
    done = run_train(project, *arguments, "c_thought=0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: command line: c_thought = 0: must be at least 1")
    assert the_error(done.stderr) and "torch" not in done.stderr


@pytest.mark.slow
def test_a_process_finds_broken_data_before_it_looks_at_the_weights(project, folder, arguments):
    path = write(folder / "d.json", [{"question": "start a4 ?", "steps": []}])
    done = run_train(project, *arguments, f"train_data_path={path}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {path}:0: field 'answer' is missing; a record needs 'question', 'steps', 'answer'"
    )
    the_error(done.stderr)


@pytest.mark.slow
def test_damaged_weights_are_what_the_tests_above_never_reach(project, arguments):
    done = run_train(project, *arguments)
    assert done.returncode == 2
    assert "cannot load weights" in the_error(done.stderr)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_and_one_sample(project, folder, arguments):
    path = write(folder / "d.json", [GOOD])
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0")
    launcher += ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    done = run_train(project, *arguments, f"train_data_path={path}", launcher=launcher)
    assert done.returncode != 0
    expected = f"error: train_data_path: {path} holds 1 sample, fewer than the 2 ranks of this run"
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and said[0].startswith(expected)
    # torchrun adds a report of its own, with a traceback of its own; none comes from a rank.
    assert 'launch/train.py", line' not in done.stderr and "cannot load weights" not in done.stderr
