"""features -> Batch: rows padded so that their first latents share a column.

    row without latents   [ question .... answer .... | pad ]
    row, two latents      [ pad | question S L L E step answer | pad ]
    row, one latent       [ question ...... S L E step step answer ]
                                              ^ the first latent of every row that has one

Shapes: B rows, L columns (a multiple of pad_to_multiple_of), P patches of all rows together.

    input_ids, attention_mask, labels, position_ids   int64 [B, L]
    pixel_values   uint8 [P, 3, H, W]; absent when no row has an image
    image_flags    int64 [B, 1], 1 for a row with an image
    num_patches    int64 [B]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coconut.types import IGNORE_INDEX, Batch, DataError


class MultimodalCollator:
    """Builds batches whose tensors are keyword arguments of `MultimodalCoconut.forward`.

    Args:
        tokenizer: its pad token (else its end-of-sequence token) fills the padding.
        image_processor: kept so that one value describes a whole data pipeline; not used to collate.
        latent_id: id of the latent token.
        pad_to_multiple_of: the length of a batch is rounded up to a multiple of this many tokens.
    """

    def __init__(
        self, tokenizer: Any, image_processor: Any = None, latent_id: int | None = None, pad_to_multiple_of: int = 1
    ) -> None:
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad_id is None:
            raise DataError("the tokenizer has neither a pad nor an end-of-sequence token to fill a batch with")
        self.pad_id: int = pad_id
        self.image_processor = image_processor
        self.latent_id = latent_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors of a batch of at least one features dict (see the module's legend)."""
        if not features:
            raise DataError("a batch needs at least one sample; collate_batch makes the inert batch of none")
        rows = [torch.as_tensor(feature["input_ids"]) for feature in features]
        labels = [torch.as_tensor(feature["labels"]) for feature in features]
        first_latents = [self._first_latent(row) for row in rows]
        column = max((first for first in first_latents if first is not None), default=0)
        # Rows without a latent have nothing to align: they start at the left, where they pad least.
        lefts = [0 if first is None else column - first for first in first_latents]
        length = self._rounded(max(left + len(row) for left, row in zip(lefts, rows, strict=True)))
        return {**self._text_tensors(rows, labels, lefts, length), **_image_tensors(features)}

    def collate_batch(self, features: Sequence[dict[str, Any]]) -> Batch:
        """A training micro-batch; of no samples, an inert one that costs one token and weighs nothing."""
        if not features:
            # Attended to, so that no softmax is taken over nothing; unlabelled, so that no loss comes of it.
            text = self._text_tensors([torch.tensor([self.pad_id])], [torch.tensor([IGNORE_INDEX])], [0], 1)
            return Batch({**text, **_image_tensors([{"num_patches": 0}])}, keys=(), n_label_tokens=0, n_tokens=0)
        tensors = self(features)
        # Position 0 of a row predicts nothing before it; a causal model never sums over that label.
        n_label_tokens = int((tensors["labels"][:, 1:] != IGNORE_INDEX).sum())
        return Batch(
            tensors=tensors,
            keys=tuple(feature["key"] for feature in features),
            n_label_tokens=n_label_tokens,
            n_tokens=int(tensors["attention_mask"].sum()),
        )

    def collate_prompts(self, features: Sequence[dict[str, Any]]) -> Batch:
        """A batch for generation: prompts and latent spans only, padded on the left so that all end together.

        ``extras`` holds "targets" (the label ids of each row, as lists) and "samples".
        """
        if not features:
            batch = self.collate_batch(())
            for name in ("labels", "position_ids"):
                del batch.tensors[name]
            batch.extras = {"targets": [], "samples": []}
            return batch
        rows = [torch.as_tensor(feature["input_ids"])[: feature["prompt_length"]] for feature in features]
        length = self._rounded(max(map(len, rows)))
        no_labels = [torch.full_like(row, IGNORE_INDEX) for row in rows]
        text = self._text_tensors(rows, no_labels, [length - len(row) for row in rows], length)
        tensors = {name: text[name] for name in ("input_ids", "attention_mask")} | _image_tensors(features)
        return Batch(
            tensors=tensors,
            keys=tuple(feature["key"] for feature in features),
            n_label_tokens=0,
            n_tokens=int(tensors["attention_mask"].sum()),
            extras={
                "targets": [_as_list(feature["labels"])[feature["prompt_length"] :] for feature in features],
                "samples": [feature.get("sample") for feature in features],
            },
        )

    def _first_latent(self, row: torch.Tensor) -> int | None:
        if self.latent_id is None:
            return None
        places = (row == self.latent_id).nonzero()
        return int(places[0]) if len(places) else None

    def _rounded(self, length: int) -> int:
        return -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def _text_tensors(
        self, rows: list[torch.Tensor], labels: list[torch.Tensor], lefts: list[int], length: int
    ) -> dict[str, torch.Tensor]:
        """Pad each row by ``lefts`` ids on the left and up to ``length`` on the right."""
        shape = (len(rows), length)
        ids_BL, labels_BL = torch.full(shape, self.pad_id), torch.full(shape, IGNORE_INDEX)
        mask = torch.zeros(shape, dtype=torch.long)
        for number, (row, row_labels, left) in enumerate(zip(rows, labels, lefts, strict=True)):
            place = slice(left, left + len(row))
            ids_BL[number, place], labels_BL[number, place], mask[number, place] = row, row_labels, 1
        return {
            "input_ids": ids_BL,
            "attention_mask": mask,
            "labels": labels_BL,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        }


def _image_tensors(features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    patches = [int(feature.get("num_patches", 0)) for feature in features]
    num_patches = torch.tensor(patches, dtype=torch.long)
    tensors = {"num_patches": num_patches, "image_flags": (num_patches > 0).long().unsqueeze(1)}
    pixels = [feature["pixel_values"] for feature in features if feature.get("num_patches")]
    if pixels:
        tensors["pixel_values"] = torch.cat(pixels)
    return tensors


def _as_list(values: Any) -> list[int]:
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)
