"""What the latent loop holds between forward and backward, and for how long."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from coconut.model.pass_cache import PassCache
from tests.model.reference import batch_rows, gradients, largest_difference, tiny_internvl, tiny_text, wrap
from tests.model.test_parity import ragged_rows


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """The keys and values of each layer of every loop that runs, as weak references."""
    found: list[weakref.ref] = []
    initialise = PassCache.__init__

    def remember(self, *args):
        initialise(self, *args)
        found.extend(weakref.ref(columns) for columns in self.layers)

    monkeypatch.setattr(PassCache, "__init__", remember)
    return found


def forward(checkpointed: bool):
    torch.manual_seed(0)
    model = wrap(tiny_internvl().double())
    if checkpointed:
        model.gradient_checkpointing_enable()
    loss = model(**batch_rows(ragged_rows(1, images=True)), loss_only=True, num_items_in_batch=1).loss
    return model, loss


def test_checkpointing_holds_no_keys_between_forward_and_backward(caches: list[weakref.ref]) -> None:
    plain, loss = forward(checkpointed=False)
    loss.backward()
    caches.clear()
    model, loss = forward(checkpointed=True)
    assert len(caches) > 1
    assert all(memory.whole.untyped_storage().nbytes() == 0 for layer in caches for memory in layer().memory)
    loss.backward()
    assert largest_difference(gradients(model), gradients(plain)) < 1e-12


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_no_family_holds_keys_with_checkpointing(kind: str, caches: list[weakref.ref]) -> None:
    model = wrap(tiny_text(kind).double())
    model.gradient_checkpointing_enable()
    loss = model(**batch_rows(ragged_rows(1, images=False)), loss_only=True, num_items_in_batch=1).loss
    assert len(caches) == 3
    assert all(memory.whole.untyped_storage().nbytes() == 0 for layer in caches for memory in layer().memory)
    loss.backward()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_left_once_the_loss_is_gone(checkpointed: bool, backward: bool, caches: list[weakref.ref]) -> None:
    gc.disable()  # a circle through the autograd graph is invisible to the collector, one beside it waits for it
    try:
        _, loss = forward(checkpointed)
        if backward:
            loss.backward()
        del loss
        assert caches
        assert all(layer() is None for layer in caches)
    finally:
        gc.enable()
