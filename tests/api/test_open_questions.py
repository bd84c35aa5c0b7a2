"""What the API document leaves open, as the project answers it: one or more tests an answer."""

from __future__ import annotations

import json

import pytest
import torch

from coconut import Config, MultimodalCoconut, create_config_from_template, load_config, load_tokenizer
from coconut.config import ConfigError
from coconut.data import ImageProcessor, MultimodalCollator, MultimodalDataset, open_dataset
from coconut.data.stage_text import mixed_stage, stage_text
from coconut.training import StageManager
from coconut.types import IGNORE_INDEX, DataError, EncodedText
from coconut.utils.tokenizer import special_token_ids


@pytest.fixture(scope="module")
def parts(maze):
    """Model, tokenizer, image processor and data set."""
    tokenizer, processor = load_tokenizer(maze.model), ImageProcessor.from_pretrained(maze.model)
    dataset = MultimodalDataset(maze.json, tokenizer, processor, max_size=4)
    return MultimodalCoconut.from_pretrained(maze.model).eval(), tokenizer, processor, dataset


@pytest.fixture(scope="module")
def batch(parts):
    """Two samples with two thoughts each."""
    model, tokenizer, processor, dataset = parts
    view = StageManager(4, 1, 1).prepare_stage_data(dataset, 2)
    return MultimodalCollator(tokenizer, processor, model.latent_token_id)([view[0], view[1]])


# -- forward --


def test_forward_gives_full_logits_and_the_loss_alone_when_asked(parts, batch):
    model = parts[0]
    full, alone = model(**batch), model(**batch, loss_only=True)
    assert full.logits.shape[:2] == batch["input_ids"].shape
    assert alone.logits is None
    assert torch.allclose(alone.loss, full.loss, rtol=1e-5)


def test_hidden_states_and_attentions_have_full_length(maze, batch):
    model = MultimodalCoconut.from_pretrained(maze.model, Config({"attn_implementation": "eager"})).eval()
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    rows, columns = batch["input_ids"].shape
    assert all(state.shape[:2] == (rows, columns) for state in out.hidden_states)
    assert all(weights.shape[-2:] == (columns, columns) for weights in out.attentions)
    of_tokens = batch["attention_mask"].bool()
    sums = out.attentions[0].sum(-1).mean(1)[of_tokens]
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def test_attentions_of_a_kernel_that_has_none_are_a_clear_error(parts, batch):
    with pytest.raises(ConfigError, match="attn_implementation eager"):
        parts[0](**batch, output_attentions=True)


def test_an_incoming_cache_with_latents_is_an_error_and_without_continues(parts, batch):
    model = parts[0]
    row = {name: batch[name][:1] for name in ("input_ids", "attention_mask")} | {
        "pixel_values": batch["pixel_values"][:1]
    }
    cache = model(**row, use_cache=True).past_key_values
    with pytest.raises(DataError, match="past_key_values"):
        model(**row, past_key_values=cache)
    whole = torch.cat([row["input_ids"], torch.tensor([[20]])], dim=1)
    mask = torch.cat([row["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    continued = model(input_ids=whole[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    at_once = model(whole, row["pixel_values"], mask, positions).logits[:, -1]
    assert torch.allclose(continued, at_once, atol=1e-4)


# -- pixels --


def test_uint8_is_normalised_and_floats_are_taken_as_they_are(parts, batch):
    model, dataset = parts[0], parts[3]
    tiles = dataset[0]["pixel_values"]
    assert tiles.dtype == torch.uint8 and tiles.shape == (1, 3, 112, 112)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    floats = (batch["pixel_values"].float() / 255 - mean) / std
    with_floats = model(**{**batch, "pixel_values": floats})
    assert torch.allclose(model(**batch).logits, with_floats.logits, atol=1e-5)


def test_the_collator_concatenates_patches_and_flags_rows_with_images(parts):
    model, tokenizer, processor, dataset = parts
    record = {"question": "start a4 ?", "steps": [], "answer": "red"}
    blind = dataset.tokenize_multimodal_sample(record)
    out = MultimodalCollator(tokenizer, processor, model.latent_token_id)([dataset[0], blind, dataset[1]])
    assert out["pixel_values"].shape == (2, 3, 112, 112)
    assert out["image_flags"].tolist() == [[1], [0], [1]]
    assert out["num_patches"].tolist() == [1, 0, 1]


def test_five_dimensions_carry_num_patches_else_all_are_real(parts, batch):
    model = parts[0]
    padded = torch.stack([batch["pixel_values"], torch.zeros_like(batch["pixel_values"])], dim=1)
    plain = model(**batch).logits
    counted = model(**{**batch, "pixel_values": padded, "num_patches": torch.tensor([1, 1])}).logits
    assert torch.equal(plain, counted)
    all_real = {name: value for name, value in batch.items() if name != "num_patches"}
    assert torch.equal(plain, model(**{**all_real, "pixel_values": batch["pixel_values"].unsqueeze(1)}).logits)
    with pytest.raises(DataError, match="image tokens"):
        model(**{**all_real, "pixel_values": padded})


# -- loading --


def test_load_tokenizer_and_from_config_supply_what_the_examples_leave_undefined(maze):
    processor = ImageProcessor.from_config(create_config_from_template("default", image_size=224, max_num_patches=3))
    assert (processor.image_size, processor.max_num_patches) == (224, 3)
    assert len(special_token_ids(load_tokenizer(str(maze.model)))) == 3


@pytest.mark.parametrize("init_token", [None, "red"])
def test_added_tokens_start_from_a_documented_token(tmp_path, init_token):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from coconut.model.tiny import build_tiny_causal, save_tiny

    words = ["<pad>", "<eos>", "<unk>", "\n", "red", "blue"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    plain = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    save_tiny(build_tiny_causal("llama", plain), plain, tmp_path / "plain")
    ids = special_token_ids(load_tokenizer(tmp_path / "plain"))
    model = MultimodalCoconut.from_pretrained(tmp_path / "plain", Config({"latent_init_token": init_token}))
    table = model.base_model.get_input_embeddings().weight
    assert model.latent_ids == ids == (6, 7, 8)
    for row in ids:
        assert torch.equal(table[row], table[words.index(init_token or "\n")])


# `from_pretrained` under ZeRO-3: tests/api/test_examples.py, test_script_basic_usage_without_a_launcher_under_zero3.


# -- generate --


def test_generate_returns_new_tokens_only_right_padded(run):
    model, tokenizer = run.trainer.model, run.dataset.tokenizer
    ids = torch.tensor([tokenizer.encode("start a4 ?"), tokenizer.encode("start b2 ?")])
    first = model.generate(input_ids=ids, do_sample=False, max_new_tokens=3)
    # The first word said ends the row that says it: the rest is padding, to the right.
    stop = int(first[0, 0])
    out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=3, eos_token_id=stop)
    assert out[0, 0] == stop
    assert out[0, 1:].tolist() == [model.eos_token_id] * (out.shape[1] - 1)
    assert first.shape[1] <= 3


def test_arguments_win_over_generation_config_which_wins_over_the_defaults(run):
    model = run.trainer.model
    ids = torch.tensor([run.dataset.tokenizer.encode("start a4 ?")])
    longest = {"do_sample": False, "eos_token_id": 10_000}
    assert model.generate(input_ids=ids, **longest).shape[1] == 100
    assert model.generate(input_ids=ids, generation_config={"max_new_tokens": 4, **longest}).shape[1] == 4
    out = model.generate(input_ids=ids, generation_config={"max_new_tokens": 4, **longest}, max_new_tokens=2)
    assert out.shape[1] == 2


def test_raw_ids_are_wrapped_in_the_training_prompt_with_the_checkpoints_latents(run, maze):
    model = MultimodalCoconut.from_pretrained(run.trainer.run_dir / "final").eval()
    dataset, tokenizer = run.dataset, run.dataset.tokenizer
    item = run.trainer.stages.prepare_stage_data(dataset, 1)[0]
    assert item["n_latents"] == model.stage_spec.n_latents == 1
    prompt = item["input_ids"][: item["prompt_length"]].unsqueeze(0)
    settings = {"do_sample": False, "max_new_tokens": 5}
    whole = model.generate(input_ids=prompt, pixel_values=item["pixel_values"], **settings)
    question = tokenizer.encode(maze.records()[0]["question"], return_tensors="pt")
    raw = model.generate(input_ids=question, pixel_values=item["pixel_values"].unsqueeze(0), **settings)
    assert torch.equal(whole, raw)
    assert not torch.isin(question, torch.tensor(model.latent_ids)).any()


def test_a_wrapped_question_is_opened_once_whatever_its_tokenizer_adds():
    from tokenizers.processors import TemplateProcessing

    from coconut.data.stage_text import build_prompt_template, stage_spec
    from coconut.model.generate import wrap_questions
    from coconut.model.tiny import build_tiny_causal, build_word_tokenizer

    tokenizer = build_word_tokenizer(["\n", "a", "red", "<s>"])
    opening = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", opening)])
    start, latent, end = special_token_ids(tokenizer)
    model = MultimodalCoconut(build_tiny_causal("llama", tokenizer), latent, start, end, tokenizer.eos_token_id)
    model.prompt_template, model.stage_spec = build_prompt_template(tokenizer, "plain"), stage_spec(1, c_thought=1)
    question = tokenizer.encode("red red", return_tensors="pt")
    wrapped, _ = wrap_questions(model, question, torch.ones_like(question), [0], None, None)
    red, line = tokenizer.convert_tokens_to_ids(["red", "\n"])
    assert wrapped[0].tolist() == [opening, red, red, line, start, latent, end]


def test_encode_images_makes_visual_features_and_giving_both_is_an_error(run):
    model, item = run.trainer.model, run.dataset[0]
    ids = torch.tensor([run.dataset.tokenizer.encode("start a4 ?")])
    features = model.encode_images(item["pixel_values"])
    assert features.shape == (1, model.tokens_per_patch, model.hidden_size)
    settings = {"do_sample": False, "max_new_tokens": 3}
    seen = model.generate(pixel_values=item["pixel_values"], input_ids=ids, **settings)
    assert torch.equal(seen, model.generate(input_ids=ids, visual_features=features, **settings))
    with pytest.raises(DataError, match="not both"):
        model.generate(pixel_values=item["pixel_values"], input_ids=ids, visual_features=features)


# -- configuration --


def test_the_file_of_the_examples_exists_and_a_missing_data_path_names_the_recipe(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    assert load_config("args/multimodal_coconut.yaml", validate=False).method == "coconut"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text((project / "args" / "demo.yaml").read_text())
    with pytest.raises(ConfigError, match=r"python launch/prepare_data.py arrow-maze"):
        load_config("demo.yaml")


def test_templates_leave_paths_unset_and_validate_false_only_parses(tmp_path, monkeypatch):
    for name in ("default", "cot", "coconut", "eval", "debug"):
        config = create_config_from_template(name)
        assert config.train_data_path is config.val_data_path is config.test_data_path is None
    monkeypatch.setenv("RATE", "1e-3")
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: ${RATE}\nc_thought: -3\ntrain_data_path: nowhere\n")
    config = load_config(path, validate=False)
    assert config.learning_rate == 1e-3 and config.c_thought == -3
    with pytest.raises(ConfigError, match="c_thought"):
        load_config(path)


def test_assignment_and_update_validate_at_once_and_merge_prefers_its_argument():
    config = Config({"seed": 1, "c_thought": 3})
    with pytest.raises(ConfigError, match="c_thought"):
        config.c_thought = 0
    with pytest.raises(ConfigError, match="uniform_prob"):
        config.update(seed=2, uniform_prob=1.5)
    assert (config.seed, config.c_thought) == (1, 3)
    assert config.merge(Config({"seed": 7})).seed == 7


def test_fp16_with_bf16_fails():
    with pytest.raises(ConfigError, match="fp16"):
        Config({"fp16": True, "bf16": True})
    config = Config({"bf16": True})
    with pytest.raises(ConfigError, match="fp16"):
        config.fp16 = True


# -- data and trainer --


def test_training_data_may_be_json_jsonl_or_shards(maze, run, tmp_path):
    for path, expected in ((maze.json, 8), (maze.jsonl, 4), (maze.shards, 4)):
        assert len(open_dataset(path, cache_dir=tmp_path)) == expected
    cached = {folder.name for folder in tmp_path.iterdir() if folder.is_dir()}
    assert len(cached) == 2  # the two files; shards are read where they lie
    open_dataset(maze.json, cache_dir=tmp_path)
    assert {folder.name for folder in tmp_path.iterdir() if folder.is_dir()} == cached
    inputs = run.trainer.inputs
    assert (len(inputs.train), len(inputs.validation), len(inputs.test)) == (8, 4, 4)


def test_items_are_stage_0_with_image_tokens_expanded(parts, maze):
    model, tokenizer, _, dataset = parts
    item, record = dataset[0], maze.records()[0]
    ids = item["input_ids"].tolist()
    assert ids.count(model.backbone.image_token_id) == model.tokens_per_patch * item["num_patches"]
    assert model.latent_token_id not in ids
    asked = tokenizer.decode([label for label in item["labels"].tolist() if label != IGNORE_INDEX])
    assert all(step in asked for step in record["steps"]) and record["answer"] in asked


def test_without_a_launcher_train_runs_one_rank(run):
    import torch.distributed as dist

    assert dist.get_world_size() == 1
    assert run.trainer.state.stage_done
    rows = [json.loads(line) for line in (run.trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"plan", "train", "val", "stage", "test"}


def test_train_epoch_and_validate_return_what_is_promised(run):
    first, again = run.returned["train_epoch"], run.returned["train_epoch again"]
    assert {"loss", "tokens", "seconds"} <= set(first)
    assert first["tokens"] == again["tokens"] > 0 and first["seconds"] > 0
    assert again["loss"] < first["loss"]
    assert {"loss", "accuracy"} <= set(run.returned["validate"])
    assert 0 <= run.returned["validate"]["accuracy"] <= 1


def test_an_optimizer_that_is_not_the_engines_raises(run):
    assert "engine.optimizer" in run.returned["foreign optimizer"]


# -- stages --


def test_get_stage_config_returns_what_is_promised():
    stages = StageManager(2, 3, 2, learning_rate=1e-4, overrides={2: {"learning_rate": 5e-5}})
    assert stages.get_stage_config(2) == {
        "stage": 2,
        "n_skip_steps": 2,
        "n_latents": 4,
        "c_thought": 2,
        "learning_rate": 5e-5,
        "epochs": 3,
    }


def test_prepare_stage_data_is_lazy_for_map_style_and_iterable_data(parts):
    from torch.utils.data import IterableDataset

    dataset = parts[3]
    read: list[int] = []

    class Counting:
        tokenizer, encoder = dataset.tokenizer, dataset.encoder

        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            read.append(index)
            return dataset[index]

    class Stream(IterableDataset):
        tokenizer, encoder = dataset.tokenizer, dataset.encoder

        def __iter__(self):
            for index in range(len(dataset)):
                read.append(index)
                yield dataset[index]

    stages = StageManager(4, 1, 1)
    view = stages.prepare_stage_data(Counting(), 2)
    assert read == [] and len(view) == 4
    assert view[3]["n_latents"] == 2 and read == [3]
    read.clear()
    stream = stages.prepare_stage_data(Stream(), 2)
    assert isinstance(stream, IterableDataset) and read == []
    iterator = iter(stream)
    assert next(iterator)["n_latents"] == 2 and read == [0]
    assert [item["n_latents"] for item in iterator] == [2, 2, 2]


def test_get_current_stage_follows_epochs_capped():
    stages = StageManager(max_latent_stage=2, epochs_per_stage=3)
    assert [stages.get_current_stage(epoch) for epoch in (0, 2, 3, 6, 8, 9, 1000)] == [0, 0, 1, 2, 2, 2, 2]


def test_after_stage_k_all_steps_go_and_short_samples_think_less_unless_padded():
    def text(n_steps: int) -> EncodedText:
        return EncodedText("key", (1, 2), tuple((10 + n,) for n in range(n_steps)), (99,))

    def staged(n_steps: int, stage: int, *, pad: bool = False) -> tuple[int, list[int]]:
        spec = StageManager(2, 1, 2, pad_latent_to_max=pad).spec(stage)
        out = stage_text(text(n_steps), spec, (6, 7, 8))
        return out.n_latents, [label for label in out.labels if label != IGNORE_INDEX]

    assert staged(5, 2) == (4, [12, 13, 14, 99])
    assert staged(5, 3) == (4, [99])  # K is 2: stage 3 drops all five steps
    assert staged(1, 2) == (2, [99])  # one step, so the thoughts of one step
    assert staged(1, 2, pad=True) == (4, [99])


def test_mixing_is_a_function_of_seed_epoch_and_key():
    def draws(seed: int, epoch: int) -> list[int]:
        return [
            mixed_stage(f"key-{n}", stage=3, uniform_prob=0.5, max_latent_stage=3, n_steps=3, seed=seed, epoch=epoch)
            for n in range(64)
        ]

    assert draws(0, 0) == draws(0, 0)
    assert draws(0, 0) != draws(0, 1) and draws(0, 0) != draws(1, 0)
    assert set(draws(0, 0)) == {0, 1, 2, 3}
