"""Tiny random models in the ordinary Hugging Face format, for the demo task, for tests and for trying things out.

    words -> word-level tokenizer -> InternVL (vision tower + Qwen2), or a text-only causal model
    texts -> byte-level BPE tokenizer -> a text-only causal model

Nothing else in the project knows that a model is tiny: `from_pretrained` loads the folder that `save_tiny` writes just
as it loads a published checkpoint of InternVL.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from coconut.types import SPECIAL_TOKENS, ConfigError

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<eos>", "<unk>"
MOST_POSITIONS = 1024  # where the tokenizer was not told a limit: transformers then says 1e30
FAMILIES = ("gpt2", "llama", "qwen2")
IMAGE_TOKENS = ("<img>", "<IMG_CONTEXT>", "</img>")  # InternVL's own spelling: begin, one a visual token, end


def build_word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    r"""A tokenizer with one token a word; text is split at blanks, and a line break is a word of its own.

    The special tokens come first, so their ids do not depend on the words: <pad> 0, <eos> 1, <unk> 2, the three image
    tokens 3-5, the three of the latent span 6-8. Decoding gives back readable text ("a b\nc").

    Args:
        words: the vocabulary; "\n" has to be in it for texts of more than one line.
    """
    special = (PAD_TOKEN, EOS_TOKEN, UNK_TOKEN, *IMAGE_TOKENS, *SPECIAL_TOKENS)
    repeated = sorted({word for word in words if word in special or list(words).count(word) > 1})
    if repeated:
        raise ConfigError(f"these words occur twice in the vocabulary, or are special tokens: {repeated}")
    broken = sorted(word for word in words if word != "\n" and word.split() != [word])
    if broken:
        raise ConfigError(f"a word holds no blank, so these are unusable: {broken}")
    vocabulary = {token: number for number, token in enumerate((*special, *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n"), "isolated"), pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed")]
    )
    # As a decoder, WordPiece puts a blank before each token that lacks its prefix: with a prefix that no word has,
    # before all but the first. The blanks around line breaks go again.
    backend.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\0", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r" ?\n ?"), "\n"),
        ]
    )
    # special=True: split off wherever they stand in a text, and left out when decoding asks for it.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        clean_up_tokenization_spaces=False,  # it would turn "a4 ?" into "a4?"
        model_max_length=256,
    )


def build_bpe_tokenizer(
    texts: Iterable[str], vocab_size: int = 1024, max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer, byte-level BPE, its merges learned from `texts`; it can spell any text.

    Args:
        texts: of the data to train on.
        vocab_size: tokens at most, bytes and <pad>, <eos> among them; fewer where the texts have no more to merge.
        max_length: longest text of the model, in tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ConfigError(f"vocab_size is {vocab_size}; the bytes alone take {len(alphabet)}, the special tokens 2")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD_TOKEN, EOS_TOKEN)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,  # it would turn "a4 ?" into "a4?"
        model_max_length=max_length,
    )


def build_tiny_internvl(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    image_size: int = 112,
    patch_size: int = 14,
    vision_hidden: int = 32,
    vision_layers: int = 1,
    vision_heads: int = 2,
    vision_mlp: int = 64,
    text_hidden: int = 64,
    text_layers: int = 3,
    text_heads: int = 4,
    text_mlp: int = 192,
    initializer_range: float = 0.08,
    position_std: float = 0.5,
) -> InternVLForConditionalGeneration:
    """A random InternVL of 0.2 M parameters, decided by `seed`; the defaults are those of the arrow maze.

    Pixel shuffle makes one image token of 2 x 2 patches: 112 pixels and patches of 14 give 4 x 4 image tokens.
    transformers' own initialisation (range 0.02, layer scale 0.1, position embeddings zero) suits large models and
    leaves one of this size learning several times more slowly, hence the other values.

    Args:
        tokenizer: gives the size of the vocabulary and the ids of <pad>, <eos> and <IMG_CONTEXT>.
        seed: of the weights; the global random state is left alone.
        image_size: pixels a side of a patch tile, a multiple of twice `patch_size`.
        initializer_range: standard deviation of all matrices.
        position_std: standard deviation of the vision tower's position embeddings.
    """
    if image_size % (2 * patch_size):
        raise ConfigError(f"image_size {image_size} is not a multiple of two patches ({2 * patch_size} pixels)")
    vision = InternVLVisionConfig(
        hidden_size=vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        intermediate_size=vision_mlp,
        image_size=[image_size, image_size],
        patch_size=[patch_size, patch_size],
        layer_scale_init_value=1.0,
        initializer_range=initializer_range,
    )
    text = Qwen2Config(
        hidden_size=text_hidden,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        num_key_value_heads=text_heads,
        intermediate_size=text_mlp,
        **_text_settings(tokenizer, initializer_range),
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=_token_id(tokenizer, IMAGE_TOKENS[1]),
        image_seq_length=(image_size // (2 * patch_size)) ** 2,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=position_std)
    return model


def build_tiny_causal(
    model_type: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    intermediate: int | None = None,
) -> PreTrainedModel:
    """A random text-only model of one of `FAMILIES`, decided by `seed`.

    Texts may be as long as the tokenizer's ``model_max_length``.

    Args:
        kv_heads: heads of keys and values in Llama and Qwen2; None: two heads of queries share one.
        intermediate: width of the MLPs; None: twice `hidden`.
    """
    if model_type not in FAMILIES:
        raise ConfigError(f"no tiny model of type {model_type!r}; choose from {', '.join(FAMILIES)}")
    if hidden % heads or heads % 2:
        raise ConfigError(f"hidden {hidden} must be a multiple of heads {heads}, and heads even")
    settings = _text_settings(tokenizer, initializer_range=0.08)
    config: PreTrainedConfig
    if model_type == "gpt2":
        # GPT-2 calls the same things otherwise, and learns its positions.
        rest = {key: value for key, value in settings.items() if key != "rope_parameters"}
        rest["n_positions"] = rest.pop("max_position_embeddings")
        config = GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, n_inner=intermediate or 2 * hidden, **rest)
    else:
        family = LlamaConfig if model_type == "llama" else Qwen2Config
        config = family(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads // 2,
            intermediate_size=intermediate or 2 * hidden,
            **settings,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def save_tiny(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike[str],
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write model and tokenizer into the folder `out`, replacing one that is there; it appears whole or not at all.

    Args:
        finish: is given the unfinished folder, to add files of its own (such as the image processor's).
    """
    target = Path(out)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if finish is not None:
        finish(unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.replace(target)


def _text_settings(tokenizer: PreTrainedTokenizerBase, initializer_range: float) -> dict[str, Any]:
    """What the text configurations share."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": min(tokenizer.model_max_length, MOST_POSITIONS),
        "initializer_range": initializer_range,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(number, int) or number == tokenizer.unk_token_id:
        raise ConfigError(f"the tokenizer has no token {token!r}; build_word_tokenizer makes one that has")
    return number
