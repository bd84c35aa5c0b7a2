"""A checkpoint with all that is needed to put questions to it: model, tokenizer, image processor, encoder, collator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.types import DataError

if TYPE_CHECKING:
    from coconut.data.collate import MultimodalCollator
    from coconut.data.encode import SampleEncoder
    from coconut.data.image import ImageProcessor
    from coconut.model.coconut import MultimodalCoconut
    from coconut.types import StageSpec


def require_fit(model: MultimodalCoconut, name: str, n_tokens: int) -> None:
    """Raises DataError where a prompt and what may be written after it are more tokens than the decoder has positions.

    Learned positions have no row for them; rotary ones go on, but were never trained there.
    """
    most = getattr(model.backbone.text_config, "max_position_embeddings", None)  # GPT-2 answers to this name too
    if most is not None and n_tokens > most:
        raise DataError(
            f"{name}: prompt, thoughts and max_new_tokens come to {n_tokens} tokens, and the model reads {most} "
            "at most; lower max_new_tokens, or shorten the question"
        )


@dataclass
class Loaded:
    """What `load` gives; the parts belong together."""

    model: MultimodalCoconut
    tokenizer: Any
    processor: ImageProcessor | None  # None for a text-only model
    encoder: SampleEncoder
    collator: MultimodalCollator
    spec: StageSpec


def load(checkpoint: Path) -> Loaded:
    """Load a folder that the trainer wrote, from `run.find_checkpoint`, onto this rank's device.

    Raises:
        CheckpointError: its files are damaged, or it does not say at which stage it was trained.
    """
    from coconut.data import ImageProcessor, MultimodalCollator, SampleEncoder
    from coconut.evaluation.run import require_stage
    from coconut.model import MultimodalCoconut
    from coconut.utils.distributed import get_device
    from coconut.utils.tokenizer import load_tokenizer

    require_stage(checkpoint)
    tokenizer = load_tokenizer(str(checkpoint))
    model = MultimodalCoconut.from_pretrained(checkpoint).to(get_device()).eval()
    assert model.stage_spec is not None
    assert model.prompt_template is not None
    processor = ImageProcessor.from_pretrained(checkpoint) if model.tokens_per_patch else None
    encoder = SampleEncoder(tokenizer, processor, model.prompt_template, model.tokens_per_patch)
    collator = MultimodalCollator(tokenizer, processor, model.latent_token_id)
    return Loaded(model, tokenizer, processor, encoder, collator, model.stage_spec)
