"""Validation inside a run: loss by teacher forcing and answers by generation, from the batches of one loader.

`coconut.evaluation.evaluate` asks a finished checkpoint; this looks at a model in its engine, on batches with labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from coconut.data.bad_samples import bad_samples_of
from coconut.data.collate import MultimodalCollator
from coconut.evaluation.score import exact_match, extract_answer
from coconut.model import MultimodalCoconut
from coconut.types import IGNORE_INDEX, Batch
from coconut.utils.distributed import all_reduce_sum


@torch.no_grad()
def validate(
    model: MultimodalCoconut, loader: Iterable[Any], tokenizer: Any, collator: MultimodalCollator, max_new_tokens: int
) -> dict[str, float]:
    """``loss`` a label token, ``accuracy`` of answers, ``full_match`` of whole texts, ``samples``; over all ranks.

    Of the ``samples``, ``bad_samples`` could not be used; the loss leaves them out, the rates take them for wrong.

    Args:
        model: in evaluation mode; every rank must call this at the same point.
        loader: yields `Batch` or a collator's dictionaries, with labels; ranks may have different numbers of them.
        tokenizer: decodes what was generated.
        collator: makes the inert batches of ranks that are through.
        max_new_tokens: a text is cut there.
    """
    sums = [0.0] * 6  # loss, label tokens, right answers, whole matches, samples, bad ones among these
    for batch in in_lockstep((as_batch(item) for item in loader), collator):
        tensors = to_device(batch, model.device)
        loss = model(**tensors, loss_only=True, num_items_in_batch=1.0).loss
        n_right, n_whole = _generate_and_score(model, batch, tensors, tokenizer, max_new_tokens)
        n_bad = len(bad_samples_of([batch]))
        values = (float(loss), batch.n_label_tokens, n_right, n_whole, len(batch.keys) + n_bad, n_bad)
        sums = [total + value for total, value in zip(sums, values, strict=True)]
    loss_sum, labels, right, whole, samples, bad_samples = all_reduce_sum(sums)
    return {
        "loss": loss_sum / max(labels, 1),
        "accuracy": right / max(samples, 1),
        "full_match": whole / max(samples, 1),
        "samples": samples,
        "bad_samples": bad_samples,
    }


def _generate_and_score(
    model: MultimodalCoconut, batch: Batch, tensors: dict[str, Any], tokenizer: Any, max_new_tokens: int
) -> tuple[int, int]:
    """Answer the prompts of a batch; returns right answers and whole matches."""
    prompt_mask = tensors["attention_mask"] * ((tensors["labels"] != IGNORE_INDEX).cumsum(1) == 0)
    ids = model.generate(
        input_ids=tensors["input_ids"],
        attention_mask=prompt_mask,
        pixel_values=tensors.get("pixel_values"),
        num_patches=tensors.get("num_patches"),
        wrap_prompt=False,
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )

    def text(row: list[int]) -> str:
        eos = model.eos_token_id
        said: str = tokenizer.decode(row[: row.index(eos)] if eos in row else row)
        return said.strip()

    right = whole = 0
    for row in range(len(batch.keys)):
        labels = batch.tensors["labels"][row]
        target, said = text(labels[labels != IGNORE_INDEX].tolist()), text(ids[row].tolist())
        whole += said == target
        right += exact_match(extract_answer(said), extract_answer(target) or target)
    return right, whole


def in_lockstep(batches: Iterator[Batch], collator: MultimodalCollator) -> Iterator[Batch]:
    """Go on with inert batches until every rank is through, so that all make the same calls."""
    while True:
        batch = next(batches, None)
        if all_reduce_sum([float(batch is not None)])[0] == 0:
            return
        yield collator.collate_batch(()) if batch is None else batch


def as_batch(item: Any) -> Batch:
    """A `Batch` as it is; a collator's dictionary with its labels counted."""
    if isinstance(item, Batch):
        return item
    return Batch(
        tensors=item,
        keys=tuple(str(row) for row in range(item["input_ids"].shape[0])),
        n_label_tokens=int((item["labels"][:, 1:] != IGNORE_INDEX).sum()),
        n_tokens=int(item["attention_mask"].sum()),
    )


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The tensors of a batch on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.tensors.items()
    }
