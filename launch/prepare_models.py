"""The small random models that `launch/prepare_data.py` builds: the maze's InternVL, and text-only decoders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from coconut.data import arrow_maze
from coconut.data.sample import read_samples
from coconut.types import ConfigError

MODEL_MARKER = "made_by_prepare_data.json"


def ensure_model(out: Path, *, seed: int, size: int, layers: int, force: bool) -> bool:
    """Save the tiny InternVL with the maze's vocabulary, unless `out` holds it; returns whether it was built."""

    def build() -> None:
        # Here, not above: these take seconds to import, and a run that finds all in place needs neither.
        from coconut.data.image import ImageProcessor
        from coconut.model.tiny import build_tiny_internvl, build_word_tokenizer, save_tiny

        def add_the_rest(folder: Path) -> None:
            tiles = ImageProcessor(image_size=size, max_num_patches=1, use_thumbnail=False, dynamic_preprocess=False)
            tiles.save_pretrained(folder)
            _mark(folder, request)

        tokenizer = build_word_tokenizer(arrow_maze.vocabulary())
        # Two patches a cell and side, whatever the size: pixel shuffle makes one image token a cell of them.
        patch_size = size // (2 * arrow_maze.GRID)
        model = build_tiny_internvl(tokenizer, seed=seed, image_size=size, patch_size=patch_size, text_layers=layers)
        save_tiny(model, tokenizer, out, finish=add_the_rest)

    request = {"seed": seed, "size": size, "layers": layers, "words": list(arrow_maze.vocabulary())}
    return _ensure(out, request, force, build)


def ensure_decoder(
    out: Path, text: Path, *, family: str, layers: int, hidden: int, heads: int, seed: int, force: bool
) -> bool:
    """Save a random text-only model, its tokenizer learned from `text`, unless `out` holds it; whether it was built."""
    samples = read_samples(text)
    texts = [piece for sample in samples for piece in (sample.question, *sample.steps, f"### {sample.answer}\n")]

    def build() -> None:
        from coconut.model.tiny import build_bpe_tokenizer, build_tiny_causal, save_tiny

        tokenizer = build_bpe_tokenizer(texts)
        model = build_tiny_causal(family, tokenizer, seed=seed, layers=layers, **shape)
        save_tiny(model, tokenizer, out, finish=lambda folder: _mark(folder, request))

    # Each head has keys of its own: at this width there is nothing to save.
    shape = {"hidden": hidden, "heads": heads, "kv_heads": heads, "intermediate": 3 * hidden}
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    request = {"family": family, "layers": layers, "seed": seed, "texts": digest, **shape}
    return _ensure(out, request, force, build)


def _ensure(out: Path, request: dict[str, object], force: bool, build: Callable[[], None]) -> bool:
    """Build a model into `out`, unless one made by this very request is there; returns whether it was built."""
    marker = out / MODEL_MARKER
    if marker.exists() and not force:
        if json.loads(marker.read_text(encoding="utf-8")) == request:
            return False
        raise ConfigError(
            f"{out} holds a model made with other settings; use --force, or --model-out for another folder"
        )
    if out.exists() and not marker.exists():
        raise ConfigError(f"{out} exists but was not made by this command; choose another folder with --model-out")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # for files of kilobytes
    out.parent.mkdir(parents=True, exist_ok=True)
    build()
    return True


def _mark(folder: Path, request: dict[str, object]) -> None:
    (folder / MODEL_MARKER).write_text(json.dumps(request), encoding="utf-8")
