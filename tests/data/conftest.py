"""A small word tokenizer, pictures and samples for the tests of the data plane."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coconut.types import SPECIAL_TOKENS, Sample

IMAGE_TOKENS = ["<img>", "<IMG_CONTEXT>", "</img>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(*, images: bool = True, latents: bool = True, chat: bool = False) -> Any:
    """Words and single punctuation marks; everything else is <unk>."""
    words = ["<pad>", "<unk>", "<eos>", "\n", "#", "###", "?", "<", ">", "|", "_", "latent", "user", "assistant"]
    words += ["start", "red", "green", "blue", "up", "down", "left", "a", "b", "c", "d", "IMG", "CONTEXT"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|#+|\w+|[^\w\s#]"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    extra = (IMAGE_TOKENS if images else []) + (list(SPECIAL_TOKENS) if latents else [])
    tokenizer.add_tokens([*extra, *(["<|im_start|>", "<|im_end|>"] if chat else [])], special_tokens=True)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def latent_ids(tokenizer: Any) -> tuple[int, int, int]:
    start, latent, end = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    return start, latent, end


def encoded_picture(width: int = 28, height: int = 28, *, seed: int = 0, fmt: str = "PNG", **options: Any) -> bytes:
    """Smooth random colours, so that resizing is well defined and JPEG stays small."""
    small = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, fmt, **options)
    return file.getvalue()


def build_samples(n: int, *, images: bool = True, side: int = 28) -> list[Sample]:
    """Samples of 0 to 3 steps, each with its own picture when ``images``."""
    return [
        Sample(
            key=f"sample-{i}",
            question=f"start {'abcd'[i % 4]} ?",
            steps=tuple(["red up b", "green left c", "blue down d"][: i % 4]),
            answer=["red", "green", "blue"][i % 3],
            images=(encoded_picture(side, side, seed=i),) if images else (),
        )
        for i in range(n)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def ids(tokenizer: Any) -> tuple[int, int, int]:
    return latent_ids(tokenizer)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return build_tokenizer


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    return encoded_picture


@pytest.fixture(scope="session")
def make_samples() -> Callable[..., list[Sample]]:
    return build_samples
