"""A saved model thinks in plain transformers too, in a process that has no `coconut`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coconut.model import MultimodalCoconut
from coconut.model.tiny import build_tiny_causal, build_tiny_internvl, build_word_tokenizer, save_tiny

START, LATENT, END, IMAGE = 6, 7, 8, 4

SCRIPT = """
import json, sys
sys.modules["coconut"] = None  # importing it fails
import torch, transformers
folder, kind = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
inputs = {name: torch.tensor(value) for name, value in json.load(sys.stdin).items()}
ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, pad_token_id=1)
print(json.dumps(ids[:, inputs["input_ids"].shape[1] :].tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "feedback"),
    [("AutoModelForImageTextToText", "hidden"), ("AutoModelForCausalLM", "hidden"), ("AutoModelForCausalLM", "normed")],
)
def test_plain_transformers_generates_the_same(kind: str, feedback: str, tmp_path: Path, monkeypatch) -> None:
    tokenizer = build_word_tokenizer(("\n", "red", "blue", "###", "a1", "b2"))
    has_images = kind == "AutoModelForImageTextToText"
    base = (
        build_tiny_internvl(tokenizer, image_size=28, seed=3)
        if has_images
        else build_tiny_causal("qwen2", tokenizer, seed=3)
    )
    with torch.no_grad():  # a model that is not dominated by its residual stream says other things after other thoughts
        for layer in (base.model.language_model if has_images else base.model).layers:
            for weight in layer.parameters():
                weight *= 4
    save_tiny(base, tokenizer, tmp_path / "start")
    model = MultimodalCoconut.from_pretrained(tmp_path / "start")
    model.set_latent_feedback(feedback)
    model.save_pretrained(tmp_path / "saved")
    picture = [3, IMAGE, 5] if has_images else []
    rows = [[*picture, 9, 10, START, LATENT, LATENT, LATENT, END], [*picture, 12, START, LATENT, END]]
    length = max(map(len, rows))
    inputs = {
        "input_ids": [[0] * (length - len(row)) + row for row in rows],
        "attention_mask": [[0] * (length - len(row)) + [1] * len(row) for row in rows],
    }
    if has_images:
        inputs["pixel_values"] = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "saved"), kind],
        input=json.dumps(inputs),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    ours = model.generate(**tensors, wrap_prompt=False, do_sample=False, max_new_tokens=6, pad_token_id=1)
    assert theirs == ours.tolist()
    without = model.generate(
        **tensors, wrap_prompt=False, do_sample=False, max_new_tokens=6, thought_transform=lambda h, k: h * 0
    )
    assert without.tolist() != theirs, "the thoughts make no difference here, so this test shows nothing"
