"""Handing a model on and bringing one in: the same logits in every direction, and nothing of this machine in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from coconut.data import ImageProcessor, open_dataset
from coconut.evaluation.ask import Settings, ask
from coconut.evaluation.card import public_config
from coconut.evaluation.export import compare_logits, is_hub_id
from coconut.evaluation.loaded import load
from coconut.model import MultimodalCoconut
from coconut.model.original import load_original
from coconut.model.tiny import build_tiny_causal
from coconut.types import CheckpointError
from launch import export as script

from .conftest import COCONUT, Maze

WITHOUT_US = """
import sys
sys.modules["coconut"] = None  # importing it fails
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("start a1 ?", return_tensors="pt").input_ids
said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
logits = [round(v, 4) for v in model(ids).logits[0, -1, :3].tolist()]
print(said.shape[1] > ids.shape[1], model.generation_config.do_sample, logits)
"""


def test_an_exported_folder_is_the_same_model(
    maze: Maze, tmp_path: Path, write_evaluation: Callable[..., Path]
) -> None:
    checkpoint, out = maze.checkpoints[4], tmp_path / "out"
    scores = write_evaluation(tmp_path / "eval", COCONUT, [True, True, False, True], checkpoint=str(checkpoint))
    assert (
        script.main(["--checkpoint", str(checkpoint), "--out", str(out), "--name", "Tiny", "--eval", str(scores)]) == 0
    )
    before, after = load(checkpoint), load(out)
    samples = [open_dataset(maze.shards).read(i) for i in range(4)]
    settings = Settings(max_new_tokens=4)
    assert [r.text for r in ask(after, samples, settings)] == [r.text for r in ask(before, samples, settings)]
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "75.00%" in card
    assert "4 latent thoughts take the place of the first 4 written steps" in card
    assert not [p.name for p in out.parent.glob(".out*")]
    assert len(after.tokenizer) == len(before.tokenizer)


def test_transformers_own_processor_makes_the_prompt_of_the_training(maze: Maze, tmp_path: Path) -> None:
    import io

    from PIL import Image
    from transformers import AutoProcessor

    from coconut.model.backbones import normalise_pixels

    out = tmp_path / "out"
    assert script.main(["--checkpoint", str(maze.checkpoints[4]), "--out", str(out)]) == 0
    loaded, processor = load(out), AutoProcessor.from_pretrained(out)
    sample = open_dataset(maze.shards).read(0)
    picture = Image.open(io.BytesIO(sample.images[0])).convert("RGB")  # type: ignore[arg-type]
    theirs = processor(images=[picture], text=[f"<IMG_CONTEXT>{sample.question}\n"], return_tensors="pt")
    features = loaded.encoder.encode(sample)
    assert theirs["input_ids"][0].tolist() == list(features["text"].prompt)
    model = loaded.model
    pixels = normalise_pixels(features["pixel_values"], model.pixel_mean, model.pixel_std, torch.float32)
    assert torch.allclose(theirs["pixel_values"], pixels, atol=1e-5)


@pytest.mark.slow
def test_it_loads_where_this_project_is_not_installed(maze: Maze, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert script.main(["--checkpoint", str(maze.checkpoints[4]), "--out", str(out)]) == 0
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US, str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = load(maze.checkpoints[4])
    ids = loaded.tokenizer("start a1 ?", return_tensors="pt").input_ids
    ours = [round(v, 4) for v in loaded.model(ids).logits[0, -1, :3].tolist()]
    assert done.stdout.split("\n")[0] == f"True False {ours}"


def test_another_models_logits_are_noticed(maze: Maze) -> None:
    assert compare_logits(load(maze.checkpoints[4]).model, maze.checkpoints[4]) == 0
    other = load(maze.checkpoints[4]).model
    with torch.no_grad():
        other.backbone.decoder_layers[0].mlp.down_proj.weight.add_(0.01)
    assert compare_logits(other, maze.checkpoints[4]) > 1e-3


def test_a_folder_that_holds_something_is_left_alone(
    maze: Maze, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert script.main(["--checkpoint", str(maze.checkpoints[4]), "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_what_cannot_work_is_refused_before_the_model_loads(
    maze: Maze, tmp_path: Path, write_evaluation: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(maze.checkpoints[4]), "--out", str(tmp_path / "out")]
    other = write_evaluation(tmp_path / "eval", COCONUT, [True], checkpoint=str(maze.checkpoints[0]))
    assert script.main([*words, "--eval", str(other)]) == 2
    assert f"{other} is of {maze.checkpoints[0]}, not of" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert script.main([*words[:3], str(tmp_path / "file" / "out")]) == 2
    assert "(Not a directory)" in capsys.readouterr().err


def test_internvl_is_written_as_it_was_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    from coconut.data.stage_text import build_prompt_template, stage_spec
    from coconut.model.tiny import build_word_tokenizer
    from tests.model.test_original_internvl import layout

    published, run, out = tmp_path / "published", tmp_path / "run", tmp_path / "out"
    tokenizer = build_word_tokenizer(("\n", "red", "blue"))
    config, weights = layout(len(tokenizer))
    weights = {name: weight.float() for name, weight in weights.items()}
    config["auto_map"] = {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    tokenizer.save_pretrained(published)
    save_torch_state_dict(weights, published)
    (published / "config.json").write_text(json.dumps(config))
    (published / "modeling_internvl_chat.py").write_text("# the published code\n")
    model = MultimodalCoconut.from_pretrained(published).float()
    model.prompt_template, model.stage_spec = build_prompt_template(tokenizer, "plain"), stage_spec(2, c_thought=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # as if it had been trained
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    ImageProcessor(56, max_num_patches=1).save_pretrained(run)
    words = ["--checkpoint", str(run), "--out", str(out)]
    assert script.main([*words, "--original-internvl", str(run)]) == 2
    assert "is not in InternVL's own format" in capsys.readouterr().err
    assert script.main([*words, "--original-internvl", str(published)]) == 0
    written = load_file(out / "original" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert torch.allclose(written["mlp1.1.weight"], weights["mlp1.1.weight"] + 0.01)
    assert json.loads((out / "original" / "config.json").read_text())["architectures"] == ["InternVLChatModel"]
    assert (out / "original" / "modeling_internvl_chat.py").read_text() == "# the published code\n"


def test_no_folder_of_this_machine_is_published() -> None:
    config = {"train_data_path": "/home/me/data/maze/train", "model_id": "a/b", "save_path": "/home/me", "seed": 3}
    assert public_config(config) == {"train_data_path": "maze/train", "model_id": "a/b", "seed": 3}
    assert is_hub_id("OpenGVLab/InternVL3-1B-hf")
    assert not any(map(is_hub_id, ("/a/b", "./b", "runs/x/final", "gpt2")))


class Original(nn.Module):
    """What the original implementation saves: the model, and its embeddings once more."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_causallm = base
        self.embedding = base.get_input_embeddings()  # type: ignore[operator]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A GPT-2 and its tokenizer, which knows nothing of latents."""
    words = ["<eos>", "\n", "###", *(f"w{i}" for i in range(20))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    build_tiny_causal("gpt2", tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def original_checkpoint(base: Path, path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model.resize_token_embeddings(26)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    weights = Original(model).state_dict()
    weights["base_causallm.transformer.h.0.attn.bias"] = torch.ones(1)  # as older transformers saved
    torch.save(weights, path)
    return model.eval()


def test_a_checkpoint_of_the_original_is_imported(base: Path, tmp_path: Path) -> None:
    theirs = original_checkpoint(base, tmp_path / "checkpoint_9")
    words = ["--original", str(tmp_path / "checkpoint_9"), "--base", str(base), "--stage", "2", "--c-thought", "1"]
    assert script.main([*words, "--out", str(tmp_path / "out")]) == 0
    loaded = load(tmp_path / "out")
    start, end, latent = 23, 24, 25  # the original's order
    assert loaded.model.latent_ids == (start, latent, end)
    assert (loaded.spec.stage, loaded.spec.n_latents) == (2, 2)
    ids = torch.tensor([[5, 6, 1, start, latent, latent, end, 2, 7]])
    # As the original computes it: the whole prefix again for each thought.
    embeds = theirs.get_input_embeddings()(ids)
    for column in (4, 5):
        hidden = theirs(inputs_embeds=embeds[:, :column], output_hidden_states=True).hidden_states[-1]
        embeds = torch.cat([embeds[:, :column], hidden[:, -1:], embeds[:, column + 1 :]], dim=1)
    expected = theirs(inputs_embeds=embeds).logits
    assert torch.allclose(loaded.model(input_ids=ids).logits, expected, atol=1e-5)
    assert loaded.model.prompt_template is not None
    assert loaded.model.prompt_template.suffix == (1,)
    assert json.loads((tmp_path / "out" / "coconut.json").read_text())["metadata"]["imported_from"].endswith(
        "checkpoint_9"
    )


def test_what_is_no_checkpoint_of_the_original_is_named(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_1"
    path.write_bytes(b"no torch file")
    with pytest.raises(CheckpointError, match="cannot be read as a torch checkpoint"):
        load_original(path, base, COCONUT)
    original_checkpoint(base, path)
    weights = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in weights.items() if "ln_f" not in k}, path)
    with pytest.raises(CheckpointError, match="2 weights are missing"):
        load_original(path, base, COCONUT)
    torch.save({k: v[:23] if "wte" in k else v for k, v in weights.items()}, path)
    with pytest.raises(CheckpointError, match="23 embeddings"):
        load_original(path, base, COCONUT)
    torch.save({k: v[:, :16] if "wte" in k else v for k, v in weights.items()}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_original(path, base, COCONUT)
    torch.save({k: v[:23] if "wte" in k or "lm_head" in k else v for k, v in weights.items()}, path)
    # Trained without thoughts, it has no rows for the latent tokens, and needs none.
    model, _ = load_original(path, base, replace(COCONUT, n_latents=0, markers=False))
    assert model.base_model.get_input_embeddings().weight.shape[0] == 23


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --checkpoint, or --original"),
        (["--original", "x", "--base", "y"], "--original needs --stage too"),
        (["--original", "nowhere", "--base", "y", "--stage", "1"], "--original nowhere is no file"),
        (["--original", __file__, "--base", "y", "--stage", "1", "--c-thought", "0"], "--c-thought is 0"),
        (["--original", __file__, "--base", "y", "--stage", "1", "--eval", "z"], "--eval takes evaluations of a"),
    ],
)
def test_a_mistake_gives_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*words, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
