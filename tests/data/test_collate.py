"""Batches: alignment on the first latent, masks, labels, pixels, and the inert batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coconut.data.collate import MultimodalCollator
from coconut.types import IGNORE_INDEX, DataError

PAD, LATENT = 0, 7


class FakeTokenizer:
    pad_token_id = PAD
    eos_token_id = 1


def feature(prompt: int, latents: int, target: int, patches: int = 0, key: str = "k"):
    ids = [2] * prompt + [5] + [LATENT] * latents + [6] + [3] * target
    n_prompt = prompt + latents + 2
    return {
        "key": key,
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor([IGNORE_INDEX] * n_prompt + [3] * target),
        "prompt_length": n_prompt,
        "num_patches": patches,
        "pixel_values": torch.full((patches, 3, 2, 2), patches, dtype=torch.uint8) if patches else None,
    }


features = st.builds(feature, st.integers(1, 9), st.integers(0, 4), st.integers(1, 6), st.integers(0, 3))


@given(rows=st.lists(features, min_size=1, max_size=6), multiple=st.sampled_from([1, 8]))
def test_batches_hold_every_row_whole_with_first_latents_aligned(rows, multiple: int) -> None:
    collator = MultimodalCollator(FakeTokenizer(), None, LATENT, pad_to_multiple_of=multiple)
    batch = collator(rows)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids.shape == mask.shape == labels.shape == batch["position_ids"].shape
    assert ids.shape[1] % multiple == 0
    columns = set()
    for row, (row_ids, row_mask, row_labels) in zip(rows, zip(ids, mask, labels, strict=True), strict=True):
        keep = row_mask.bool()
        assert torch.equal(row_ids[keep], row["input_ids"])
        assert torch.equal(row_labels[keep], row["labels"])
        assert keep.diff().sum() <= 2  # one block
        assert (row_ids[~keep] == PAD).all()
        assert (row_labels[~keep] == IGNORE_INDEX).all()
        columns |= set((row_ids == LATENT).nonzero()[:1].flatten().tolist())
    assert len(columns) <= 1
    positions = batch["position_ids"][mask.bool()]
    assert positions.tolist() == [p for row in rows for p in range(len(row["input_ids"]))]
    assert (batch["position_ids"] >= 0).all()
    patches = [row["num_patches"] for row in rows]
    assert batch["num_patches"].tolist() == patches
    assert batch["image_flags"].tolist() == [[int(n > 0)] for n in patches]
    if sum(patches):
        assert batch["pixel_values"].dtype == torch.uint8
        assert batch["pixel_values"][:, 0, 0, 0].tolist() == [n for n in patches for _ in range(n)]
    else:
        assert "pixel_values" not in batch


def test_rows_without_latents_are_not_pushed_right() -> None:
    batch = MultimodalCollator(FakeTokenizer(), None, LATENT)([feature(8, 2, 1), feature(1, 0, 1), feature(2, 1, 3)])
    assert batch["attention_mask"][:, 0].tolist() == [1, 1, 0]
    assert batch["input_ids"].shape == (3, 14)


def test_counts_of_a_batch() -> None:
    batch = MultimodalCollator(FakeTokenizer(), None, LATENT).collate_batch(
        [feature(3, 1, 2, key="a"), feature(1, 1, 4, key="b")]
    )
    assert batch.keys == ("a", "b")
    assert batch.n_label_tokens == 6
    assert batch.n_tokens == 3 + 3 + 2 + 1 + 3 + 4


def test_the_inert_batch_can_run_and_weighs_nothing() -> None:
    collator = MultimodalCollator(FakeTokenizer(), None, LATENT, pad_to_multiple_of=8)
    batch = collator.collate_batch([])
    assert (batch.keys, batch.n_label_tokens, batch.n_tokens) == ((), 0, 0)
    assert batch.tensors["input_ids"].shape == (1, 1)
    assert batch.tensors["attention_mask"].tolist() == [[1]]
    assert batch.tensors["labels"].tolist() == [[IGNORE_INDEX]]
    assert batch.tensors["image_flags"].tolist() == [[0]]
    assert "pixel_values" not in batch.tensors
    with pytest.raises(DataError, match="at least one sample"):
        collator([])
    prompts = collator.collate_prompts([])
    assert set(prompts.tensors) == {"input_ids", "attention_mask", "num_patches", "image_flags"}


def test_prompts_end_together_and_hold_no_answer() -> None:
    rows = [feature(3, 1, 2, patches=2, key="a"), feature(6, 0, 4, key="b")]
    batch = MultimodalCollator(FakeTokenizer(), None, LATENT, pad_to_multiple_of=4).collate_prompts(rows)
    ids, mask = batch.tensors["input_ids"], batch.tensors["attention_mask"]
    assert ids.tolist() == [[PAD, PAD, 2, 2, 2, 5, LATENT, 6], [2, 2, 2, 2, 2, 2, 5, 6]]
    assert mask.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8]
    assert batch.extras["targets"] == [[3, 3], [3, 3, 3, 3]]
    assert "labels" not in batch.tensors
    assert batch.tensors["pixel_values"].shape == (2, 3, 2, 2)


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    class Bare:
        pad_token_id = None
        eos_token_id = None

    with pytest.raises(DataError, match="neither a pad nor"):
        MultimodalCollator(Bare(), None, LATENT)
    Bare.eos_token_id = 4
    assert MultimodalCollator(Bare(), None, LATENT).pad_id == 4
