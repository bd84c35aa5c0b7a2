"""`launch/prepare_data.py`: the arguments a user types, what they make, and what is said when they do not fit."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, InternVLForConditionalGeneration

from coconut.data.image import ImageProcessor

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "prepare_data.py"
SMALL = ["--train", "40", "--val", "5", "--test", "6", "--test-paths", "4"]


def load_main() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


main = load_main()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "maze"
    assert main(["arrow-maze", "--out", str(folder), *SMALL]) == 0
    return folder


def test_model_folder_loads_with_plain_transformers(out):
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = InternVLForConditionalGeneration.from_pretrained(out / "model")
    record = json.loads((out / "examples" / "examples.json").read_text())[0]
    text = "\n".join([record["question"], *record["steps"], "### " + record["answer"]])
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == model.config.text_config.vocab_size
    assert ImageProcessor.from_pretrained(out / "model").image_size == 112


def test_second_run_does_nothing(out, capsys):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(["arrow-maze", "--out", str(out), *SMALL]) == 0
    assert capsys.readouterr().out.count("there already") == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "224"], "cell_px 28 (asked for: 56)"),
        (["--size", "100"], "multiple of 8"),
        (["--model-seed", "1"], "--model-out"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(out, capsys, arguments, message):
    assert main(["arrow-maze", "--out", str(out), *SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_model_of_another_seed_beside_the_same_data(out):
    assert main(["arrow-maze", "--out", str(out), *SMALL, "--model-seed", "1", "--model-out", str(out / "other")]) == 0
    assert (out / "other" / "model.safetensors").read_bytes() != (out / "model" / "model.safetensors").read_bytes()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("precious")
    assert main(["arrow-maze", "--out", str(tmp_path), *SMALL, "--force"]) == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "model" / "mine.txt").read_text() == "precious"


def test_larger_pictures_keep_one_image_token_a_cell(tmp_path):
    assert main(["arrow-maze", "--out", str(tmp_path), *SMALL, "--size", "448"]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["image_seq_length"] == 16
    assert config["vision_config"]["image_size"] == [448, 448]


def test_help_lists_the_data_sets(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "arrow-maze" in capsys.readouterr().out


def test_a_decoder_from_scratch(tmp_path, capsys):
    data = tmp_path / "prosqa"
    generate = ["prosqa", "--generate", "--nodes", "12", "--size", "20", "--out", str(data)]
    build = ["decoder", "--text", str(data / "train.json"), "--model-out", str(data / "model"), "--layers", "1"]
    assert main(generate) == 0
    assert main(build) == 0
    model = AutoModelForCausalLM.from_pretrained(data / "model")
    tokenizer = AutoTokenizer.from_pretrained(data / "model")
    assert (model.config.model_type, model.config.num_hidden_layers) == ("qwen2", 1)
    record = json.loads((data / "train.json").read_text())[0]
    assert len(tokenizer.tokenize(record["steps"][1])) == 6  # a token a word, and the full stop
    capsys.readouterr()
    assert main(build) == 0
    assert "there already" in capsys.readouterr().out
    for more, message in (
        (["--seed", "1"], "made with other settings"),
        (["--family", "bert", "--model-out", str(tmp_path / "other")], "choose from gpt2, llama, qwen2"),
        (["--text", str(tmp_path / "none.json")], "is no file"),
    ):
        assert main([*build, *more]) == 2
        assert message in capsys.readouterr().err
