"""The documented data set and encoder on files."""

from __future__ import annotations

import json

import pytest
import torch

from coconut.data.dataset import MultimodalDataset
from coconut.data.encode import SampleEncoder, with_stage
from coconut.data.image import ImageProcessor
from coconut.data.stage_text import build_prompt_template, stage_spec
from coconut.types import IGNORE_INDEX, DataError, Sample


@pytest.fixture
def data_file(tmp_path, make_samples, picture):
    records = []
    for i, sample in enumerate(make_samples(4)):
        (tmp_path / f"{i}.png").write_bytes(sample.images[0])
        record = {"id": sample.key, "question": sample.question, "steps": list(sample.steps), "answer": sample.answer}
        records.append(record | {"image": f"{i}.png"})
    (tmp_path / "wide.png").write_bytes(picture(112, 56))
    records[1]["image"] = ["1.png", "wide.png"]
    del records[2]["image"]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    return path


def test_items_are_stage_0_with_image_tokens_expanded(data_file, tokenizer, ids) -> None:
    dataset = MultimodalDataset(data_file, tokenizer, ImageProcessor(56, 4))
    assert len(dataset) == 4
    item = dataset[1]
    # 56 x 56 tiles of 4 tokens: one tile, and two with a thumbnail
    assert item["pixel_values"].shape == (4, 3, 56, 56)
    assert (item["num_patches"], item["patches_per_image"]) == (4, [1, 3])
    words = tokenizer.convert_ids_to_tokens(item["input_ids"].tolist())
    images = ["<img>", *["<IMG_CONTEXT>"] * 4, "</img>", "<img>", *["<IMG_CONTEXT>"] * 12, "</img>"]
    prompt = [*images, "start", "b", "?", "\n", "<|start-latent|>", "<|end-latent|>"]
    target = ["red", "up", "b", "\n", "###", "green", "<eos>"]
    assert words == prompt + target
    assert item["labels"].tolist() == [IGNORE_INDEX] * len(prompt) + item["input_ids"].tolist()[len(prompt) :]
    assert item["attention_mask"].sum() == len(words)
    assert item["key"] == dataset.key(1) == "sample-1"
    assert dataset[2]["pixel_values"] is None
    assert dataset[2]["num_patches"] == 0


def test_other_stages_raw_records_and_max_size(data_file, tokenizer, ids) -> None:
    spec = stage_spec(1, c_thought=2)
    dataset = MultimodalDataset(data_file, tokenizer, ImageProcessor(28, 1), max_size=2, spec=spec)
    assert len(dataset) == 2
    assert dataset[1]["n_latents"] == 2
    stage_0 = MultimodalDataset(data_file, tokenizer, ImageProcessor(28, 1))[1]
    assert torch.equal(with_stage(stage_0, spec, ids)["input_ids"], dataset[1]["input_ids"])
    raw = dataset.tokenize_multimodal_sample(json.loads(data_file.read_text())[1])
    assert torch.equal(raw["input_ids"], dataset[1]["input_ids"])
    with pytest.raises(DataError, match="record: field 'answer' is missing"):
        dataset.tokenize_multimodal_sample({"question": "q", "steps": []})


def test_faults_are_found_at_construction(data_file, tokenizer, make_tokenizer, tmp_path) -> None:
    with pytest.raises(DataError, match="load_tokenizer"):
        MultimodalDataset(data_file, make_tokenizer(latents=False), ImageProcessor(28))
    (tmp_path / "0.png").unlink()
    (tmp_path / "3.png").unlink()
    with pytest.raises(DataError, match=r"2 faults: .*0\.png does not exist.*3\.png does not exist"):
        MultimodalDataset(data_file, tokenizer, ImageProcessor(28))


def test_errors_name_the_sample(tokenizer, ids, picture) -> None:
    template = build_prompt_template(tokenizer)
    sample = Sample("k", "start a ?", (), "red", (picture(28, 28), picture(28, 28)[:60]), source="shard-000003.tar")
    encoder = SampleEncoder(tokenizer, ImageProcessor(28, 1), template, 1, max_length=8)
    with pytest.raises(DataError, match=r"shard-000003\.tar \(key k\), image 2 of 2"):
        encoder.encode(sample)
    with pytest.raises(DataError, match=r"\(key k\), image 1 of 2.*text only"):
        SampleEncoder(tokenizer, None, template, 0).encode(sample)
    text_only = Sample("k", "start a ?", (), "red", source="d.json:5")
    with pytest.raises(DataError, match=r"d\.json:5 \(key k\) has 9 tokens at stage 0, more than max_length 8"):
        encoder.with_stage(encoder.encode(text_only), stage_spec(0), ids)
    assert encoder.with_stage(encoder.encode(text_only), stage_spec(0, method="cot"), ids)["n_latents"] == 0


def test_features_carry_no_image_files(tokenizer, make_samples) -> None:
    encoder = SampleEncoder(tokenizer, ImageProcessor(28, 1), build_prompt_template(tokenizer), 1)
    features = encoder.encode(make_samples(1)[0])
    assert features["sample"].images == ()
    assert features["sample"].question == "start a ?"
