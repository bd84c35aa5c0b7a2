"""The tokenizer with the three tokens of the latent span."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coconut.types import SPECIAL_TOKENS, ConfigError, DataError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def load_tokenizer(id_or_path: str | Path) -> Any:
    """Loads a Hugging Face tokenizer, adds the special tokens it lacks, and makes sure it can pad.

    Args:
        id_or_path: a hub id, or a folder that holds a tokenizer (a checkpoint of ours, say).

    Raises:
        ConfigError: nothing usable is there; the message names the id or path.
    """
    name = str(id_or_path)
    if not name.strip():
        raise ConfigError("the tokenizer's id or path is empty: set model_id")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError ... for the same cause
        kind, reason = "hub id (no such folder is here)", _first_line(error)
        if Path(name).is_dir():
            kind = "folder"
            if not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
                reason = f"it holds none of {', '.join(_TOKENIZER_FILES)}"
        raise ConfigError(
            f"no tokenizer can be loaded from {name!r}, read as a {kind}: {reason}. "
            "Give (model_id, --checkpoint) a folder with tokenizer files, or a model that the hub or its cache holds"
        ) from error
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    tokenizer.added_latent_tokens = tuple(missing)  # their embeddings do not exist yet
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer of {name!r} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token  # masks tell padding from the end of a text, ids need not
    return tokenizer


def special_token_ids(tokenizer: Any) -> tuple[int, int, int]:
    """The ids of the start, latent and end tokens.

    Raises:
        DataError: the tokenizer lacks one of them.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} lacks {', '.join(missing)}: "
            "load it with coconut.load_tokenizer, which adds them"
        )
    start, latent, end = (vocabulary[token] for token in SPECIAL_TOKENS)
    return start, latent, end


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__
