"""The Config object: reading, changing, merging, saving."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from coconut.config import Config, ConfigError, load_config, parse_overrides, validate_config
from coconut.config.schema import Schema


def lines(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    """The faults of an error, one a line, without the headline."""
    text = str(error.value).split("\n  ")
    return text[1:] if len(text) > 1 else text


def test_every_key_is_present_with_its_default() -> None:
    config = Config()
    assert config.to_dict() == Schema().model_dump()
    assert config.explicit == frozenset()
    assert (config.seed, config.c_thought, config.learning_rate, config.image_size) == (42, 2, 1e-5, 448)


def test_every_key_is_described_and_has_a_default() -> None:
    for name, field in Schema.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


def test_reading() -> None:
    config = Config({"c_thought": 3})
    assert config.c_thought == config.get("c_thought") == 3
    assert config.has("c_thought")
    assert not config.has("no_such_key")
    assert config.get("no_such_key", "default") == "default"
    assert not hasattr(config, "no_such_key")
    with pytest.raises(AttributeError, match="did you mean learning_rate"):
        _ = config.learning_rat
    assert "learning_rate" in dir(config)


def test_to_dict_is_a_copy() -> None:
    config = Config({"stages": {0: {"epochs": 3}}})
    config.to_dict()["stages"][0]["epochs"] = 4
    assert config.stages == {0: {"epochs": 3}}


def test_assignment_is_checked_and_remembered() -> None:
    config = Config()
    config.learning_rate = "3e-4"  # type: ignore[assignment]
    assert config.learning_rate == 3e-4
    assert config.explicit == {"learning_rate"}
    with pytest.raises(ConfigError, match="c_thought = 0: must be at least 1"):
        config.c_thought = 0
    with pytest.raises(ConfigError, match="unknown key; did you mean c_thought"):
        config.c_thoughts = 3
    assert config.c_thought == 2
    assert config.explicit == {"learning_rate"}


def test_update_changes_all_or_nothing() -> None:
    config = Config({"bf16": True})
    with pytest.raises(ConfigError, match="fp16 = True with bf16 = True"):
        config.fp16 = True
    with pytest.raises(ConfigError) as error:
        config.update(seed=1, uniform_prob=2, epochs_per_stage=0)
    assert len(lines(error)) == 2
    assert config.seed == 42
    config.update(fp16=True, bf16=False)
    assert (config.fp16, config.bf16, config.dtype) == (True, False, "float16")


def test_merge_takes_what_the_argument_set_itself() -> None:
    first = Config({"learning_rate": 1e-3, "c_thought": 3, "stages": {0: {"epochs": 1, "uniform_prob": 0.0}}})
    second = Config({"learning_rate": 1e-5, "seed": 1, "stages": {0: {"epochs": 2}, 1: {"epochs": 7}}})
    merged = first.merge(second)
    assert (merged.learning_rate, merged.c_thought, merged.seed) == (1e-5, 3, 1)  # 1e-5 is the default, but it was set
    assert merged.stages == {0: {"epochs": 2, "uniform_prob": 0.0}, 1: {"epochs": 7}}
    assert first.learning_rate == 1e-3
    assert second.c_thought == 2
    with pytest.raises(ConfigError, match="fp16"):
        Config({"fp16": True}).merge(Config({"bf16": True}))


def test_save_and_load_give_the_same_settings(tmp_path: Path) -> None:
    config = Config(
        {"learning_rate": 1e-05, "name": "123", "cot": True, "use_fsdp": True, "stages": {"last": {"epochs": 3}}}
    )
    path = tmp_path / "deep" / "config.yaml"
    config.save(path)
    assert load_config(path, validate=False) == config
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def test_copies_and_pickles() -> None:
    config = Config({"name": "x", "stages": {1: {"epochs": 3}}})
    other = copy.deepcopy(config)
    assert pickle.loads(pickle.dumps(config)) == config == other
    other.name = "y"
    assert config.name == "x"
    assert config != other
    assert repr(config) == "Config({'name': 'x', 'stages': {1: {'epochs': 3}}})"


def test_run_dir_and_dtype() -> None:
    config = Config({"save_path": "here", "name": "run"})
    assert config.run_dir == Path("here/run")
    assert config.dtype == "float32"
    assert Config({"bf16": True}).dtype == "bfloat16"


def test_debug_makes_a_small_run_unless_told_otherwise() -> None:
    config = Config({"debug": True, "max_val_samples": None})
    assert (config.log_level, config.max_train_samples, config.max_val_samples) == ("DEBUG", 32, None)
    config.debug = False
    assert (config.log_level, config.max_train_samples) == ("INFO", None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"leraning_rate": 1}, "leraning_rate = 1: unknown key; did you mean learning_rate?"),
        ({"lr": 1}, "did you mean learning_rate?"),
        ({"zzz": 1}, "unknown key; docs/configuration.md lists all"),
        ({"method": "cocount"}, "no_curriculum, no_thought; did you mean coconut?"),
        ({"c_thought": True}, "c_thought = True: must be a number"),
        ({"c_thought": 1.5}, "must be a whole number"),
        ({"learning_rate": "1e-3x"}, "learning_rate = '1e-3x': must be a number"),
        ({"learning_rate": 0}, "must be more than 0 (peak learning rate of AdamW; default 1e-05)"),
        ({"learning_rate": float("nan")}, "must be a finite number"),
        ({"uniform_prob": 1.5}, "must be at most 1"),
        ({"bf16": "maybe"}, "must be true or false"),
        ({"name": 2024}, "must be text; put it in quotes"),
        ({"name": "a/b"}, "must be a single folder name"),
        ({"load_model_path": "None"}, "write null for none"),
        ({"resume": 3}, "an epoch's number does not name a checkpoint"),
        ({"stages": 3}, "stages = 3: must be a table"),
        ({"stages": {0: 3}}, "stages.0 = 3: must be a table such as"),
        ({"stages": {0: {"epohs": 3}}}, "stages.0.epohs = 3: unknown key; did you mean stages.0.epochs?"),
        ({"stages": {0: {"epochs": 0}}}, "stages.0.epochs = 0: must be at least 1 (epochs of this stage, at most)"),
        ({"stages": {"first": {"epochs": 1}}}, "a stage's number must be 0, 1, 2 ..., or `last`"),
        ({"stages": {-1: {"epochs": 1}}}, "a stage's number must be 0, 1, 2 ..., or `last`"),
        ({"fp16": True, "bf16": True}, "fp16 = True with bf16 = True: choose one"),
        ({"attn_implementation": "flash_attention_2"}, "set bf16: true, or use sdpa"),
        ({"global_batch_size": 8, "batch_size_training": 16}, "is more than global_batch_size = 8"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 2}, "keep one of them"),
    ],
)
def test_each_fault_says_value_and_remedy(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config(given)
    assert said in str(error.value)
    assert len(lines(error)) == 1


def test_a_faulty_value_does_not_raise_further_faults() -> None:
    with pytest.raises(ConfigError) as error:
        Config({"fp16": True, "bf16": "maybe", "global_batch_size": "x", "batch_size_training": 99})
    assert len(lines(error)) == 2


def test_without_validation_everything_is_kept_and_can_be_mended() -> None:
    config = Config({"c_thought": 0, "odd": 1, "seed": 7}, validate=False)
    assert (config.c_thought, config.odd, config.seed, config.learning_rate) == (0, 1, 7, 1e-5)
    with pytest.raises(ConfigError) as error:
        validate_config(config)
    assert {line.split(" ")[0] for line in lines(error)} == {"c_thought", "odd", "train_data_path:"}
    config.c_thought = 2  # the unknown key is no reason to refuse this
    assert [fault.key for fault in config.faults] == ["odd"]
    with pytest.raises(ConfigError, match="uniform_prob"):
        config.uniform_prob = 2


class TestStages:
    def test_a_stage_follows_the_run_where_it_says_nothing(self) -> None:
        config = Config({"learning_rate": 1e-3, "advance_at": 0.9, "stages": {1: {"epochs": 3, "advance_at": None}}})
        assert config.stage_setting(1, "epochs") == 3
        assert config.stage_setting(1, "learning_rate") == 1e-3
        assert config.stage_setting(1, "advance_at") is None
        assert config.stage_setting(2, "advance_at") == 0.9
        assert config.stage_setting(2, "epochs") == config.epochs_per_stage

    def test_last_is_stage_k(self) -> None:
        config = Config({"max_latent_stage": 2, "stages": {0: {"epochs": 1}, "last": {"learning_rate": 3e-4}}})
        assert config.stages == {0: {"epochs": 1}, 2: {"learning_rate": 3e-4}}
        config.max_latent_stage = 6
        assert config.stages == {0: {"epochs": 1}, 6: {"learning_rate": 3e-4}}

    def test_last_must_agree_with_its_number(self) -> None:
        agreeing = {"last": {"epochs": 3}, 4: {"epochs": 3, "uniform_prob": 0.0}}
        assert Config({"stages": agreeing}).stages == {4: {"epochs": 3, "uniform_prob": 0.0}}
        with pytest.raises(ConfigError, match=r"stages.last.epochs = 3 contradicts stages.4.epochs = 5"):
            Config({"stages": {"last": {"epochs": 3}, 4: {"epochs": 5}}})

    @pytest.mark.parametrize("value", ["many", -1, True, 2.5, None])
    def test_a_faulty_number_of_stages_is_the_only_fault(self, value: object) -> None:
        stages = {"last": {"epochs": 3}, 4: {"epochs": 5}}
        with pytest.raises(ConfigError) as error:
            Config({"max_latent_stage": value, "stages": stages})
        assert str(error.value).startswith(f"max_latent_stage = {value!r}") and "\n" not in str(error.value)
        with pytest.raises(ConfigError, match=r"2 faults[\s\S]*stages\.4\.epochs = 0: must be at least 1"):
            Config({"max_latent_stage": value, "stages": {"last": {"epochs": 0}}})

    def test_a_later_setting_of_the_run_replaces_those_of_stages(self) -> None:
        config = Config({"learning_rate": 1e-3, "stages": {0: {"learning_rate": 2e-3, "epochs": 2}, 1: {"epochs": 3}}})
        assert config.notes == ()
        config.learning_rate = 5e-6
        assert config.stages == {0: {"epochs": 2}, 1: {"epochs": 3}}
        assert "learning_rate also replaces what lower layers set for stages 0" in config.notes[0]

    def test_assignment_replaces_the_table(self) -> None:
        config = Config({"stages": {0: {"epochs": 2}}})
        config.stages = {1: {"epochs": 3}}
        assert config.stages == {1: {"epochs": 3}}

    def test_settings_without_effect_are_noted(self) -> None:
        assert "settings of stages 7 are not used" in Config({"stages": {7: {"epochs": 1}}}).notes[0]
        assert "without load_model_path: stage 0 is left out" in Config({"start_stage": 1}).notes[0]
        assert "may end before stage 4 begins" in Config({"num_epochs": 20}).notes[0]
        assert Config({"num_epochs": None}).notes == ()

    def test_settings_of_stages_that_a_method_does_not_have(self) -> None:
        stages = {0: {"epochs": 2}, 4: {"epochs": 1}}
        assert Config({"method": "cot", "stages": stages}).notes == (
            "settings of stages 4 are not used: method = 'cot' has a single stage",
        )
        (note,) = Config({"method": "no_cot", "stages": stages}).notes
        assert note.startswith(
            "settings of stages 0, 4 are not used: method = 'no_cot' has a single stage, with the run's"
        )
        assert Config({"method": "icot", "stages": stages}).notes == ()


class TestOldKeys:
    @pytest.mark.parametrize("flag", ["coconut", "cot", "no_cot"])
    def test_method_flags(self, flag: str) -> None:
        config = Config({name: name == flag for name in ("coconut", "cot", "no_cot")})
        assert config.method == flag
        assert [name for name in ("coconut", "cot", "no_cot") if config.get(name)] == [flag]
        assert config.has(flag)

    def test_flags_that_are_false_say_nothing(self) -> None:
        assert Config({"cot": False, "no_cot": 0}).explicit == frozenset()

    def test_a_later_layer_changes_the_method(self) -> None:
        config = Config({"cot": True})
        config.update(coconut=True)
        assert config.method == "coconut"

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"cot": True, "coconut": True}, "cot"),
            ({"method": "coconut", "no_cot": True}, "no_cot = True contradicts method = 'coconut'"),
            ({"cot": "perhaps"}, "must be true or false"),
            (
                {"gradient_clip_norm": 1.0, "max_grad_norm": 2.0},
                "gradient_clip_norm = 1.0 contradicts max_grad_norm = 2.0",
            ),
            ({"eval_data_path": "a", "test_data_path": "b"}, "eval_data_path = 'a' contradicts test_data_path = 'b'"),
            ({"use_fsdp": True, "use_ddp": True}, "use_ddp = True"),
            (
                {"use_fsdp": True, "deepspeed": "x.json"},
                "use_fsdp = True (meaning deepspeed = 'ds_configs/zero3.json')",
            ),
        ],
    )
    def test_contradictions(self, given: dict[str, object], said: str) -> None:
        with pytest.raises(ConfigError) as error:
            Config(given)
        assert said in str(error.value)

    def test_renamed_keys(self) -> None:
        config = Config({"gradient_clip_norm": 0.5, "eval_data_path": "x.json"})
        assert config.max_grad_norm == config.gradient_clip_norm == 0.5
        assert config.test_data_path == config.eval_data_path == "x.json"

    def test_fsdp_means_zero_3_and_is_noted_once(self) -> None:
        config = Config({"use_fsdp": True})
        assert config.deepspeed == "ds_configs/zero3.json"
        assert config.use_fsdp
        assert not config.use_ddp
        config.seed = 3
        assert len([note for note in config.notes if "use_fsdp: true means ZeRO stage 3" in note]) == 1
        config.deepspeed = "ds_configs/zero2.json"
        assert config.notes == ()

    def test_ddp_means_zero_1(self) -> None:
        config = Config()
        config.use_ddp = True
        assert config.deepspeed == "ds_configs/zero1.json"
        assert "ZeRO stage 1" in config.notes[0]

    @pytest.mark.parametrize(
        ("old", "new"), [(0, "none"), (False, "none"), (None, "none"), (True, "auto"), ("a/b", "a/b")]
    )
    def test_resume(self, old: object, new: str) -> None:
        assert Config({"resume": old}).resume == new

    @pytest.mark.parametrize(
        ("typed", "new"), [("0", "none"), ("False", "none"), ("null", "none"), ("true", "auto"), ("0/1", "0/1")]
    )
    def test_resume_typed_means_what_it_means_in_a_file(self, typed: str, new: str) -> None:
        assert Config(parse_overrides([f"resume={typed}"])).resume == new
