"""What the API document says of each class and function, on the real parts: tiny InternVL, arrow maze, DeepSpeed."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch

from coconut import (
    Config,
    create_config_from_template,
    get_logger,
    init_distributed_training,
    is_main_process,
    load_config,
    set_seed,
    setup_logging,
    validate_config,
)
from coconut.config import ConfigError
from coconut.data import ImageProcessor, MultimodalCollator, MultimodalDataset
from coconut.training import StageManager


@pytest.fixture(scope="module")
def model(maze):
    from coconut import MultimodalCoconut

    return MultimodalCoconut.from_pretrained(maze.model).eval()


@pytest.fixture(scope="module")
def tokenizer(maze):
    from coconut import load_tokenizer

    return load_tokenizer(maze.model)


@pytest.fixture(scope="module")
def processor(maze):
    return ImageProcessor.from_pretrained(maze.model)


@pytest.fixture(scope="module")
def dataset(maze, tokenizer, processor):
    return MultimodalDataset(str(maze.json), tokenizer, processor, max_size=4)


@pytest.fixture(scope="module")
def collator(tokenizer, processor, model):
    return MultimodalCollator(tokenizer, processor, model.latent_token_id)


# -- Config --


def test_config_methods(tmp_path):
    config = Config({"c_thought": 3})
    assert config.c_thought == config.get("c_thought") == config.to_dict()["c_thought"] == 3
    assert config.has("seed") and not config.has("seeed")
    assert config.get("seeed") is None and config.get("seeed", default=7) == 7
    assert config.update(seed=5) is None and config.seed == 5
    merged = config.merge(Config({"seed": 9}))
    assert (merged.seed, merged.c_thought, config.seed) == (9, 3, 5)
    config.save(tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml"), validate=False) == config


@pytest.mark.parametrize("name", ["default", "cot", "coconut", "eval", "debug"])
def test_every_documented_template_exists(name):
    assert isinstance(create_config_from_template(name), Config)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ("model_id: null", "model_id"),
        ("c_thought: 0", "c_thought"),
        ("max_latent_stage: -1", "max_latent_stage"),
        ("learning_rate: -1.0", "learning_rate"),
        ("batch_size_training: 0", "batch_size_training"),
        ("image_size: 1", "image_size"),
        ("max_num_patches: 0", "max_num_patches"),
        ("train_data_path: nowhere.json", "train_data_path"),
        ("deepspeed: nowhere.json", "deepspeed"),
    ],
)
def test_validate_config_checks_what_is_documented(tmp_path, values, named):
    path = tmp_path / "c.yaml"
    path.write_text(values + "\n")
    config = load_config(path, validate=False)
    with pytest.raises(ConfigError, match=named):
        validate_config(config)
    with pytest.raises(ConfigError, match=named):
        load_config(path)


def test_the_settings_of_the_troubleshooting_section_can_be_assigned():
    config = create_config_from_template("default")
    config.gradient_checkpointing = True
    config.fp16 = True
    config.use_fsdp = True
    config.num_workers = 4
    config.batch_size_training, config.image_size, config.max_num_patches = 1, 224, 4
    assert config.gradient_checkpointing and config.fp16 and config.use_fsdp and config.num_workers == 4
    assert config.deepspeed == "ds_configs/zero3.json"


# -- the model --


def test_model_attributes(model):
    assert model.hidden_size == 64
    assert isinstance(model.latent_token_id, int)
    assert model.base_model.config.model_type == "internvl"


@pytest.mark.parametrize("stage", [0, 2])
def test_forward_returns_what_is_documented(model, dataset, collator, stage):
    view = StageManager(4, 1, 1).prepare_stage_data(dataset, stage)
    batch = collator([view[0], view[1]])
    out = model(**batch, use_cache=True, output_hidden_states=True)
    rows, columns = batch["input_ids"].shape
    assert out.loss.dim() == 0 and torch.isfinite(out.loss)
    assert out.logits.shape == (rows, columns, len(dataset.tokenizer))
    assert out.past_key_values.get_seq_length() == columns
    assert out.hidden_states[-1].shape == (rows, columns, model.hidden_size)
    assert out.attentions is None
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], model(**batch).loss)
    assert model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).loss is None


def test_generation_defaults_are_those_documented():
    from coconut.model.generate import generation_settings

    settings = generation_settings(None, {}, eos_token_id=1)
    assert (settings.max_new_tokens, settings.do_sample, settings.temperature) == (100, True, 0.7)
    assert (settings.top_p, settings.top_k) == (0.9, 50)


# -- the data --


def test_dataset_items(dataset, maze, tokenizer, processor):
    item = dataset[0]
    assert {"pixel_values", "input_ids", "attention_mask", "labels", "num_patches"} <= set(item)
    assert item["pixel_values"].shape == (1, 3, 112, 112) and item["num_patches"] == 1
    assert item["input_ids"].shape == item["attention_mask"].shape == item["labels"].shape
    assert len(dataset) == 4  # max_size
    elsewhere = MultimodalDataset(str(maze.jsonl), tokenizer, processor, image_root=str(maze.json.parent))
    assert len(elsewhere) == 4
    again = dataset.tokenize_multimodal_sample(maze.records()[0])
    assert torch.equal(again["input_ids"], item["input_ids"])


def test_collator_output(dataset, collator):
    batch = collator([dataset[0], dataset[1]])
    documented = {"pixel_values", "input_ids", "attention_mask", "labels", "position_ids", "image_flags"}
    assert documented <= set(batch)
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    assert len({batch[name].shape for name in ("input_ids", "attention_mask", "labels", "position_ids")}) == 1


def test_collator_aligns_latents(dataset, collator, model):
    view = StageManager(4, 1, 1).prepare_stage_data(dataset, 2)
    short = dict(view[1])
    short["input_ids"], short["labels"] = short["input_ids"][3:], short["labels"][3:]
    ids = collator([view[0], short])["input_ids"]
    first = (ids == model.latent_token_id).int().argmax(dim=1)
    assert first[0] == first[1]


def test_image_processor_methods(maze):
    paths = [str(maze.json.parent / record["image"][0]) for record in maze.records()[:2]]
    processor = ImageProcessor(image_size=56, max_num_patches=4)
    one, both = processor.process_image(paths[0]), processor.process_images(paths)
    assert one.shape[1:] == (3, 56, 56)
    assert torch.equal(both[: len(one)], one) and len(both) == 2 * len(one)


# -- training --


def test_trainer_methods(run):
    returned = run.returned
    assert returned["train"] is None
    assert returned["save_checkpoint"] is None
    assert len(returned["checkpoints"]) == 1
    assert all(isinstance(value, float) for name in ("train_epoch", "validate") for value in returned[name].values())
    state = run.trainer.state
    assert state.stage_done and state.stage == 1


def test_trainer_leaves_the_documented_folders(run):
    from transformers import AutoTokenizer, InternVLForConditionalGeneration

    for name in ("stage_0", "stage_1", "final"):
        folder = run.trainer.run_dir / name
        assert InternVLForConditionalGeneration.from_pretrained(folder) is not None
        assert "<|latent|>" in AutoTokenizer.from_pretrained(folder).get_vocab()
    assert (run.trainer.run_dir / "metrics.jsonl").read_text().count('"kind": "stage"') == 2


def test_stage_manager():
    stages = StageManager(max_latent_stage=3, epochs_per_stage=2)
    assert stages.c_thought == 2
    assert [stages.get_current_stage(epoch) for epoch in range(4)] == [0, 0, 1, 1]
    assert stages.get_stage_config(2)["n_latents"] == 4


# -- utilities --


def test_distributed_without_a_launcher(monkeypatch):
    assert init_distributed_training() is None
    assert is_main_process() is True
    if not torch.distributed.is_initialized():
        monkeypatch.setenv("RANK", "1")
        assert is_main_process() is False


def test_logging_goes_to_console_and_file_with_times_and_levels(tmp_path, capsys):
    config = create_config_from_template("default", save_path=str(tmp_path), log_level="WARNING")
    setup_logging(config)
    logger = get_logger(__name__)
    assert isinstance(logger, logging.Logger)
    logger.info("too quiet")
    logger.warning("loud enough")
    for text in (capsys.readouterr().err, (config.run_dir / "log.txt").read_text()):
        assert "too quiet" not in text
        line = next(line for line in text.splitlines() if "loud enough" in line)
        assert line[:4].isdigit() and "WARNING" in line


def test_set_seed_seeds_every_generator():
    draws = []
    for _ in range(2):
        set_seed(11)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
