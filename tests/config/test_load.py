"""Files, inheritance, the environment, overrides, templates, and what is said when something is wrong with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coconut.config import (
    Config,
    ConfigError,
    create_config_from_template,
    load_config,
    parse_overrides,
    validate_config,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def read(text: str, *overrides: str) -> Config:
    return load_config(write("c.yaml", text), validate=False, overrides=overrides)


def test_numbers_are_numbers(folder: Path) -> None:
    config = read(
        "learning_rate: 1e-5\nweight_decay: 1.E-2\nuniform_prob: .5\nsamples_per_epoch: 5e3\nseed: 1_000\nname: 1e5x\n"
    )
    assert config.learning_rate == 1e-5
    assert isinstance(config.learning_rate, float)
    assert (config.weight_decay, config.uniform_prob, config.samples_per_epoch, config.seed) == (0.01, 0.5, 5000, 1000)
    assert isinstance(config.samples_per_epoch, int)
    assert config.name == "1e5x"


def test_an_empty_file_means_the_defaults(folder: Path) -> None:
    assert read("# nothing\n") == Config()


def test_all_faults_are_listed_with_file_and_line(folder: Path) -> None:
    write("data.json", "[]")
    write("base.yaml", "train_data_path: data.json\nc_thought: 0\n")
    text = (
        "base_config: base.yaml\n\nlearning_rat: 1\nseed: ${NO_SUCH}\nfp16: true\nbf16: true\nval_data_path: x.json\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(write("c.yaml", text), overrides=["uniform_prob=3", "stages.0.epochs=x"])
    faults = str(error.value).split("\n  ")
    assert faults[0] == "7 faults in the configuration:"
    places = {line.split(": ")[1].split(" ")[0]: line.split(": ")[0] for line in faults[1:]}
    assert places == {
        "c_thought": "base.yaml:2",
        "learning_rat": "c.yaml:3",
        "seed": "c.yaml:4",
        "fp16": "c.yaml:5",
        "val_data_path": "c.yaml:7",
        "uniform_prob": "command line",
        "stages.0.epochs": "command line",
    }


class TestInheritance:
    def test_the_file_wins_over_its_base(self, folder: Path) -> None:
        write("args/base.yaml", "seed: 1\nc_thought: 3\nstages: {0: {epochs: 2, uniform_prob: 0.0}}\n")
        write("args/deep/mid.yaml", "base_config: ../base.yaml\nseed: 2\n")
        write("leaf.yaml", "base_config: args/deep/mid.yaml\nstages: {0: {epochs: 5}}\n")
        config = load_config("leaf.yaml", validate=False, overrides=["max_latent_stage=2"])
        assert (config.seed, config.c_thought, config.max_latent_stage) == (2, 3, 2)
        assert config.stages == {0: {"epochs": 5, "uniform_prob": 0.0}}
        assert config.explicit == {"seed", "c_thought", "max_latent_stage", "stages"}
        assert config.origins["c_thought"].endswith("base.yaml:2")

    def test_an_empty_stages_takes_the_inherited_ones_away(self, folder: Path) -> None:
        write("base.yaml", "stages: {0: {epochs: 2}}\n")
        assert read("base_config: base.yaml\nstages:\n").stages == {}

    def test_older_flags_are_judged_file_by_file(self, folder: Path) -> None:
        write("base.yaml", "cot: true\ncoconut: false\n")
        assert read("base_config: base.yaml\n").method == "cot"
        assert read("base_config: base.yaml\ncoconut: true\ncot: false\n").method == "coconut"

    def test_a_circle(self, folder: Path) -> None:
        write("a.yaml", "base_config: b.yaml\n")
        write("b.yaml", "base_config: a.yaml\n")
        with pytest.raises(ConfigError, match=r"goes in a circle: a.yaml -> b.yaml -> a.yaml"):
            load_config("a.yaml")

    @pytest.mark.parametrize(
        ("value", "said"), [("no.yaml", "no such file as no.yaml"), ("[a, b]", "must be the path of one YAML file")]
    )
    def test_a_bad_base(self, folder: Path, value: str, said: str) -> None:
        with pytest.raises(ConfigError) as error:
            read(f"seed: 1\nbase_config: {value}\n")
        assert said in str(error.value)
        assert str(error.value).startswith("c.yaml:2: ")


class TestEnvironment:
    def test_values_are_typed_after_substitution(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RATE", "1e-3")
        monkeypatch.setenv("ON", "true")
        monkeypatch.setenv("WHERE", "/data:x")
        config = read(
            "learning_rate: ${RATE}\nbf16: ${ON}\nsave_path: ${WHERE}/runs\nc_thought: ${NONE_SUCH:4}\n"
            'image_root: ${NONE_SUCH:}\nname: "${NONE_SUCH:12}"\nstages: {0: {epochs: "${NONE_SUCH:3}"}}\n'
        )
        assert (config.learning_rate, config.bf16, config.save_path, config.c_thought) == (
            1e-3,
            True,
            "/data:x/runs",
            4,
        )
        assert (config.image_root, config.name, config.stages) == (None, "12", {0: {"epochs": 3}})
        assert not config.faults

    def test_an_unset_variable_fails_even_without_validation(self, folder: Path) -> None:
        with pytest.raises(ConfigError) as error:
            read("seed: ${NONE_SUCH}\nname: a-${NONE_SUCH}-${ALSO_NOT}\n")
        assert "c.yaml:1: seed: ${NONE_SUCH} is not set in the environment; export it, or give a default" in str(
            error.value
        )
        assert "c.yaml:2: name: ${NONE_SUCH} and ${ALSO_NOT}" in str(error.value)

    def test_a_misspelt_reference(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"write \$\{NAME\} or"):
            read("name: ${1X}\n")


class TestUnreadable:
    def test_a_missing_file_names_its_neighbours(self, folder: Path) -> None:
        write("demo.yaml", "")
        with pytest.raises(ConfigError, match=r"^dmeo.yaml: no such configuration file; there are demo.yaml$"):
            load_config("dmeo.yaml")

    def test_a_folder(self, folder: Path) -> None:
        write("args/demo.yaml", "")
        with pytest.raises(ConfigError, match=r"^args: is a folder; give one of its files; there are args/demo.yaml$"):
            load_config("args")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("seed: 1\nname: a: b\n", "c.yaml:2:8: is not YAML"),
            ("seed: 1\n\tname: b\n", "c.yaml:2:1: is not YAML"),
            ("stages: {0: {epochs: 1}\n", "is not YAML"),
            ("- seed\n", "c.yaml: must hold `key: value` lines, but holds a list"),
            ("seed\n", "but holds the single value 'seed'"),
            ("seed: !!python/object:os.system x\n", "is not YAML: could not determine a constructor"),
            ("seed: \x00\n", "c.yaml: is not YAML"),
            ("name: 2024-13-45\n", "c.yaml: is not YAML: month must be in 1..12"),
            pytest.param(f"name: {'[' * 1500}\n", "c.yaml: is nested too deeply", id="deep list"),
            pytest.param(
                "stages:\n" + "".join(f"{' ' * n}{n}:\n" for n in range(1, 1000)),
                "c.yaml: is nested too deeply",
                id="deep table",
            ),
        ],
    )
    def test_what_is_not_a_configuration(self, folder: Path, text: str, said: str) -> None:
        with pytest.raises(ConfigError) as error:
            read(text)
        assert said in str(error.value)

    def test_bytes(self, folder: Path) -> None:
        Path("c.yaml").write_bytes(b"\x80\x81")
        with pytest.raises(ConfigError, match="is not text in UTF-8"):
            load_config("c.yaml")

    def test_a_key_set_twice(self, folder: Path) -> None:
        with pytest.raises(ConfigError) as error:
            read("seed: 1\nname: a\nseed: 2\nstages:\n  0: {epochs: 1}\n  0: {epochs: 2}\n")
        assert "c.yaml:3: seed: is set twice, in lines 1 and 3; remove one" in str(error.value)
        assert "stages.0: is set twice, in lines 5 and 6" in str(error.value)


class TestOverrides:
    def test_values_are_typed_by_their_key(self) -> None:
        assert parse_overrides(
            [
                "learning_rate=5e-6",
                "max_latent_stage=6",
                "name=123",
                "bf16=true",
                "image_root=null",
                "resume=none",
                "max_steps=null",
            ]
        ) == {
            "learning_rate": 5e-6,
            "max_latent_stage": 6,
            "name": "123",
            "bf16": True,
            "image_root": None,
            "resume": "none",
            "max_steps": None,
        }

    def test_the_last_of_two_wins(self) -> None:
        assert parse_overrides(["seed=1", "seed=2"]) == {"seed": 2}

    def test_nested(self) -> None:
        typed = parse_overrides(["stages.0.learning_rate=1e-3", "stages.0.epochs=2", "stages.last.uniform_prob=0"])
        assert typed == {"stages": {0: {"learning_rate": 1e-3, "epochs": 2}, "last": {"uniform_prob": 0}}}
        assert parse_overrides(["stages={1: {epochs: 2}}"]) == {"stages": {1: {"epochs": 2}}}

    def test_text_may_hold_anything(self) -> None:
        assert parse_overrides(["train_data_path=a=b: c#d"]) == {"train_data_path": "a=b: c#d"}
        assert parse_overrides(["eval_data_path=12"]) == {"eval_data_path": "12"}

    def test_bad_forms_are_all_listed(self) -> None:
        with pytest.raises(ConfigError) as error:
            parse_overrides(["seed", "--seed=3", "stages={", "=3", f"seed={'[' * 1500}"])
        text = str(error.value)
        assert "'seed' is not of the form key=value; write seed=value" in text
        assert "write seed=3" in text
        assert "'stages={': the value is not YAML" in text
        assert "[[[': the value is not YAML" in text
        assert text.startswith("5 faults")

    def test_they_win_over_the_file_and_its_stages(self, folder: Path) -> None:
        text = "learning_rate: 1e-3\nstages:\n  0: {learning_rate: 2e-3, epochs: 3}\n"
        config = read(text, "learning_rate=5e-6", "stages.1.learning_rate=1e-4", "stages.0.epochs=4")
        assert config.learning_rate == 5e-6
        assert config.stages == {0: {"epochs": 4}, 1: {"learning_rate": 1e-4}}

    def test_a_key_that_has_no_inner_keys(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"command line: seed = \{'x': 3\}: must be a whole number"):
            validate_config(read("", "seed.x=3"))


class TestPaths:
    def test_the_recipe_is_named(self, folder: Path) -> None:
        text = "train_data_path: data/arrow_maze/shards/train\nmodel_id: data/arrow_maze/model\nval_data_path: x.json\n"
        with pytest.raises(ConfigError) as error:
            validate_config(read(text))
        faults = str(error.value).split("\n  ")
        assert all("python launch/prepare_data.py arrow-maze" in fault for fault in faults[1:])
        assert len(faults) == 4

    def test_training_data_must_be_given(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"^train_data_path: not set; .*prepare_data.py arrow-maze"):
            validate_config(Config())

    def test_a_sound_configuration_passes(self, folder: Path) -> None:
        for name in ("train", "val", "images/x", "ds.json", "model/config.json", "ckpt/x"):
            write(name, "")
        text = (
            "train_data_path: train\nval_data_path: val\nimage_root: images\ndeepspeed: ds.json\n"
            "model_id: ./model\nresume: ckpt\nadvance_at: 0.9\n"
        )
        validate_config(read(text))
        assert load_config("c.yaml").train_data_path == "train"

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("image_root: train", "image_root = 'train': is not a folder"),
            ("deepspeed: ds_configs/zero4.json", "no such file; known here: ds_configs/zero3.json"),
            ("resume: nowhere", "must be auto, none, or a checkpoint that exists"),
            ("load_model_path: nowhere", "is not a folder; give a checkpoint's, or null"),
            ("model_id: ./nowhere", "give a folder with config.json, or a hub id"),
            ("advance_at: 0.9", "advance_at: looks at validation, but val_data_path is not set"),
            ("stages: {0: {advance_at: 0.9}}", "advance_at: looks at validation"),
            ("save_only_improve: true", "save_only_improve: looks at validation"),
        ],
    )
    def test_what_is_not_there(self, folder: Path, line: str, said: str) -> None:
        write("train", "")
        write("ds_configs/zero3.json", "{}")
        with pytest.raises(ConfigError) as error:
            validate_config(read(f"train_data_path: train\n{line}\n"))
        assert said in str(error.value)
        assert "\n" not in str(error.value)

    def test_evaluation_needs_only_its_own_data(self, folder: Path) -> None:
        write("test.json", "")
        validate_config(Config({"only_eval": True, "eval_data_path": "test.json", "train_data_path": "not/here"}))
        with pytest.raises(ConfigError, match=r"^test_data_path: not set"):
            validate_config(Config({"only_eval": True}))


class TestTemplates:
    @pytest.mark.parametrize("name", ["default", "cot", "coconut", "eval", "debug"])
    def test_each_is_sound_and_leaves_paths_unset(self, name: str) -> None:
        config = create_config_from_template(name, batch_size_training=4)
        assert config.batch_size_training == 4
        assert not [key for key in config.explicit if key.endswith(("_path", "_root"))]
        assert config.name.startswith("multimodal_")

    def test_the_example_of_the_documentation(self, folder: Path) -> None:
        config = create_config_from_template(
            "coconut", c_thought=3, max_latent_stage=6, batch_size_training=4, learning_rate=5e-6
        )
        config.save("args/my_experiment.yaml")
        assert load_config("args/my_experiment.yaml", validate=False) == config

    def test_an_unknown_name(self) -> None:
        with pytest.raises(
            ConfigError, match=r"must be one of default, cot, coconut, eval, debug; did you mean debug\?"
        ):
            create_config_from_template("debgu")

    def test_a_bad_override(self) -> None:
        with pytest.raises(ConfigError, match="c_thougth = 3: unknown key; did you mean c_thought"):
            create_config_from_template("cot", c_thougth=3)


def test_importing_the_configuration_touches_no_torch() -> None:
    code = "import sys, coconut; from coconut import Config, load_config, get_logger; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
