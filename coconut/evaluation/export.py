"""A checkpoint as a folder to hand on: plain transformers loads it, and so does this project, thoughts and all.

OUT/config.json, model.safetensors, generation_config.json      plain transformers
OUT/tokenizer ..., preprocessor_config.json
OUT/coconut.json                                                latent ids, prompt template, stage
OUT/README.md                                                   the model card
OUT/original/                                                   InternVL's own format, where it is asked for
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coconut.data.image import ImageProcessor
from coconut.evaluation.card import model_card, public_config
from coconut.evaluation.collect import read_evaluation
from coconut.model.backbones import backbone_class, normalise_pixels
from coconut.model.backbones.original_internvl import export_original
from coconut.model.coconut import MultimodalCoconut
from coconut.types import LATENT_TOKEN, CheckpointError, ConfigError, StageSpec

TOLERANCE = 1e-5  # largest difference of logits that counts as none


def export(
    model: MultimodalCoconut,
    tokenizer: Any,
    processor: ImageProcessor | None,
    out: Path,
    *,
    name: str,
    evaluations: Sequence[Path] = (),
) -> float:
    """Write the folder, load it with plain transformers, and compare.

    Args:
        model: with its stage; on the CPU.
        tokenizer: that it was trained with.
        processor: of its images; None for text.
        out: folder to write; must not hold anything yet.
        name: of the model, for the card.
        evaluations: folders of `launch/evaluate.py`.

    Returns:
        the largest difference of logits between the exported folder in plain transformers and the model.

    Raises:
        ConfigError: `out` holds something already.
        CheckpointError: the logits differ by more than TOLERANCE.
        DataError: an evaluation folder cannot be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another --out, or remove it")
    scores = [read_evaluation(folder) for folder in evaluations]
    assert model.stage_spec is not None
    config = model.metadata.get("config") or {}
    metadata = {**model.metadata, "config": public_config(config)}
    if is_hub_id(str(config.get("model_id", ""))):
        metadata["base_model"] = config["model_id"]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    before, model.metadata = model.metadata, metadata
    try:
        _settle_generation(model, tokenizer)
        model.save_pretrained(partial)
    finally:
        model.metadata = before
    tokenizer.save_pretrained(partial)
    if processor is not None:
        processor.save_pretrained(partial)
        _write_processor(model, partial)
    card = model_card(name, model.stage_spec, metadata, scores, processor is not None)
    (partial / "README.md").write_text(card, encoding="utf-8")
    difference = compare_logits(model, partial)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the exported logits differ by {difference:.2g}, more than {TOLERANCE}; {partial} is left to look at"
        )
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return difference


def export_original_internvl(out: Path, original: Path) -> float:
    """Write OUT/original in the format that InternVL was published in, and compare what it loads as.

    Args:
        out: folder that `export` wrote; LoRA is merged there.
        original: folder of the published model that training began with: its configuration and code are taken over.

    Returns:
        the largest difference of logits between the two folders.

    Raises:
        CheckpointError: the logits differ by more than TOLERANCE.
    """
    from coconut.utils.tokenizer import load_tokenizer

    config = read_original_config(original)
    model = MultimodalCoconut.from_pretrained(out)
    dtype = str(model.base_model.dtype).removeprefix("torch.")
    config |= {"torch_dtype": dtype, "llm_config": {**config["llm_config"], "torch_dtype": dtype}}
    folder = out / "original"
    export_original(model.base_model.state_dict(), config, folder)
    load_tokenizer(out).save_pretrained(folder)
    for file in sorted(original.iterdir()):  # code that auto_map names, the licence, the preprocessor
        is_weights = file.name.endswith((".safetensors", ".bin", ".index.json"))
        if file.is_file() and not is_weights and not (folder / file.name).exists():
            shutil.copy(file, folder)
    again = MultimodalCoconut.from_pretrained(folder)
    again.prompt_template = model.prompt_template
    with torch.no_grad():
        ids, tiles = _example(model)
        ours, theirs = (m.eval()(input_ids=ids, pixel_values=tiles).logits for m in (model, again))
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(f"the logits of {folder} differ by {difference:.2g}, more than {TOLERANCE}")
    return difference


def read_original_config(original: Path) -> dict[str, Any]:
    """config.json of a folder in InternVL's own format.

    Raises:
        ConfigError: there is none, or it is of another format.
    """
    try:
        config: dict[str, Any] = json.loads((original / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{original} has no config.json that can be read ({error})") from error
    if "llm_config" not in config:
        raise ConfigError(
            f"{original} is not in InternVL's own format (InternVLChatModel): its config has no llm_config"
        )
    return config


def is_hub_id(name: str) -> bool:
    """Whether a model's name is OWNER/NAME of a hub, and no folder here."""
    return name.count("/") == 1 and not name.startswith(("/", ".")) and not Path(name).exists()


def _settle_generation(model: MultimodalCoconut, tokenizer: Any) -> None:
    """Greedy answers that end where the model was taught to end."""
    settings = model.base_model.generation_config
    settings.do_sample = False
    for name in ("temperature", "top_p", "top_k"):
        setattr(settings, name, None)
    settings.eos_token_id = model.eos_token_id
    settings.pad_token_id = tokenizer.pad_token_id


def _write_processor(model: MultimodalCoconut, folder: Path) -> None:
    """What AutoProcessor loads: a text with one image token an image becomes the prompt that the model was taught."""
    from transformers import AutoTokenizer, InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    template = model.prompt_template
    if model.base_model.config.model_type != "internvl" or template is None or not template.image_open:
        return
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if not hasattr(tokenizer, "context_image_token"):
        ids = (template.image_open[0], template.image_context, template.image_close[0])
        begin, context, end = (tokenizer.convert_ids_to_tokens(token) for token in ids)
        # The processor asks for a video token too, of which a new one would have no embedding. No video is ever shown,
        # and a text never holds the latent token.
        names = {"start_image_token": begin, "context_image_token": context, "end_image_token": end}
        tokens = {**names, "video_token": LATENT_TOKEN}
        tokenizer = AutoTokenizer.from_pretrained(str(folder), extra_special_tokens=tokens)
    images = GotOcr2ImageProcessor.from_pretrained(str(folder))
    seen = InternVLProcessor(images, tokenizer, InternVLVideoProcessor(), image_seq_length=model.tokens_per_patch)
    seen.save_pretrained(folder)


@torch.no_grad()
def compare_logits(model: MultimodalCoconut, folder: Path) -> float:
    """Largest difference of logits on a prompt without thoughts, with a random picture where the model takes any."""
    auto_class = backbone_class(model.base_model.config.model_type).auto_class
    plain = auto_class.from_pretrained(str(folder), dtype=model.base_model.dtype).eval()
    ids, tiles = _example(model)
    pixels = {}
    if tiles is not None:
        mean, std, dtype = model.pixel_mean, model.pixel_std, model.base_model.dtype
        pixels = {"pixel_values": normalise_pixels(tiles, mean, std, dtype)}
    ours = model(input_ids=ids, pixel_values=tiles).logits
    return float((plain(input_ids=ids, **pixels).logits - ours).abs().max())


def _example(model: MultimodalCoconut) -> tuple[Tensor, Tensor | None]:
    """A prompt of random words without thoughts, and a random tile (uint8) where the model takes any."""
    assert model.prompt_template is not None
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(model.backbone.text_config.vocab_size, (24,), generator=generator).tolist()
    special = {*model.latent_ids, model.backbone.image_token_id}
    question = [word for word in words if word not in special]
    tiles = None
    if model.tokens_per_patch:
        size = model.backbone.tile_size
        tiles = torch.randint(256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
    ids = torch.tensor([model.prompt_template.prompt(question, [model.tokens_per_patch] if tiles is not None else [])])
    return ids, tiles


def original_stage(stage: int, c_thought: int, max_latent_stage: int, method: str) -> StageSpec:
    """The stage of an imported checkpoint, as its configuration file says."""
    from coconut.data.stage_text import stage_spec

    return stage_spec(stage, method=method, c_thought=c_thought, max_latent_stage=max_latent_stage)
