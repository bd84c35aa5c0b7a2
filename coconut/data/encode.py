"""Sample -> features: a sample's tiles and token ids, and the ids and labels of one stage.

    Sample --SampleEncoder.encode--> features --with_stage--> features + input_ids, labels ...

A *features* dict is what a data set's item is and what the collator takes:

    key               str
    sample            Sample without its image bytes (for reports and errors)
    text              EncodedText
    pixel_values      uint8 [patches, 3, H, W], or None for a sample without image
    num_patches       int, rows of pixel_values
    patches_per_image list[int], one entry an image
    after `with_stage`: input_ids, attention_mask, labels (int64 [L]), n_latents, prompt_length (int)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coconut.data.stage_text import encode_text, stage_text
from coconut.types import DataError, EncodedText, PromptTemplate, Sample, StageSpec

if TYPE_CHECKING:
    from coconut.data.image import ImageProcessor, Room


class SampleEncoder:
    """Turns samples into features; holds only plain values, so any worker can own a copy.

    Args:
        tokenizer: a Hugging Face tokenizer.
        image_processor: None for text-only data.
        template: from `build_prompt_template`.
        tokens_per_patch: image tokens that the model makes of one patch (InternVL at 448 x 448: 256).
        max_length: longest allowed staged text in tokens; None for no limit.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: ImageProcessor | None,
        template: PromptTemplate,
        tokens_per_patch: int,
        max_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.template = template
        self.tokens_per_patch = tokens_per_patch
        self.max_length = max_length

    def encode(self, sample: Sample, room: Room | None = None) -> dict[str, Any]:
        """Decode and tile the images, tokenise the text.

        Args:
            sample: its images as paths or encoded bytes.
            room: where an image's tiles go (see `ImageProcessor.process_image`).

        Raises:
            DataError: naming the sample, for a broken image, an image without an image processor, or a
                tokenizer that cannot hold it.
        """
        tiles = [self._tiles(sample, number, room) for number in range(len(sample.images))]
        patches_per_image = [int(image.shape[0]) for image in tiles]
        return {
            "key": sample.key,
            "sample": dataclasses.replace(sample, images=()) if sample.images else sample,
            "text": self.encode_text(sample, patches_per_image),
            "pixel_values": (tiles[0] if len(tiles) == 1 else torch.cat(tiles)) if tiles else None,
            "num_patches": sum(patches_per_image),
            "patches_per_image": patches_per_image,
        }

    def encode_text(self, sample: Sample, patches_per_image: list[int]) -> EncodedText:
        """The text alone, for images whose patch counts are known."""
        image_tokens = [self.tokens_per_patch * patches for patches in patches_per_image]
        return encode_text(sample, self.tokenizer, self.template, image_tokens)

    def with_stage(self, features: dict[str, Any], spec: StageSpec, ids: tuple[int, int, int]) -> dict[str, Any]:
        """`with_stage` within this encoder's max_length."""
        return with_stage(features, spec, ids, self.max_length)

    def _tiles(self, sample: Sample, number: int, room: Room | None) -> torch.Tensor:
        where = f"{sample.source or sample.key} (key {sample.key}), image {number + 1} of {len(sample.images)}"
        if self.image_processor is None:
            raise DataError(f"{where}: the sample has an image, but this model takes text only")
        try:
            return self.image_processor.process_image(sample.images[number], room)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def with_stage(
    features: dict[str, Any], spec: StageSpec, ids: tuple[int, int, int], max_length: int | None = None
) -> dict[str, Any]:
    """A copy of ``features`` with the ids and labels of a stage; ``ids`` are start, latent, end.

    Raises:
        DataError: the staged text is longer than max_length tokens.
    """
    staged = stage_text(features["text"], spec, ids)
    if max_length is not None and len(staged.input_ids) > max_length:
        source = features["sample"].source if "sample" in features else ""
        raise DataError(
            f"{source or 'sample'} (key {features['key']}) has {len(staged.input_ids)} tokens at stage "
            f"{spec.stage}, more than max_length {max_length}; raise it or take the sample out"
        )
    return {
        **features,
        "input_ids": _int64(staged.input_ids),
        "attention_mask": torch.ones(len(staged.input_ids), dtype=torch.long),
        "labels": _int64(staged.labels),
        "n_latents": staged.n_latents,
        "prompt_length": staged.prompt_length,
    }


def _int64(values: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))  # a third of torch.tensor's time
