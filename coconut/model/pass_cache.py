"""Keys and values of all passes of the latent loop, and what becomes of them between forward and backward.

    pass k's attention --update--> columns behind those of passes 0 .. k-1, in memory that all passes share
    end_forward() --> the memory is given back
    first recomputation in a layer --> the memory comes back, filled anew from the layer's inputs

Nothing is ever overwritten with other values.

Shapes: B rows, q columns of one pass, p columns before it, h heads of keys and values, D their size, L all columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states
from transformers import LlamaModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

#: What transformers calls keys and values among a model's arguments; the second name is that of releases before 5.24.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

Columns = tuple[Tensor, Tensor]  # keys and values [B, h, columns, D]


class _Append(torch.autograd.Function):
    """Write new columns behind earlier ones into memory that all passes share, and return a view of all so far.

    A concatenation in each pass would copy the whole prefix each time, and the backward would hold every copy. Columns
    are written once and never changed (a recomputation writes the same values again), so every pass may keep its view;
    ``.data`` says so to autograd, which would take the next pass's columns for a change of this one's.
    """

    @staticmethod
    def forward(ctx: Any, memory: _Memory, new_BhqD: Tensor, earlier_BhpD: Tensor | None) -> Tensor:
        ctx.start = 0 if earlier_BhpD is None else earlier_BhpD.shape[-2]
        return memory.write(new_BhqD, ctx.start)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor | None]:
        (gradient_BhD,) = gradients
        earlier = gradient_BhD[..., : ctx.start, :] if ctx.start else None
        return None, gradient_BhD[..., ctx.start :, :], earlier


class _Memory:
    """Room for the keys, or the values, of all columns in one layer; made when the first are there."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.whole: Tensor | None = None

    def write(self, columns_BhqD: Tensor, start: int) -> Tensor:
        """All columns up to the end of these, which are put at `start`."""
        if self.whole is None:
            rows, heads, _, size = columns_BhqD.shape
            self.whole = columns_BhqD.new_empty(rows, heads, self.length, size)
        end = start + columns_BhqD.shape[-2]
        self.whole.data[..., start:end, :] = columns_BhqD
        return self.whole.data[..., :end, :]

    def resize(self, filled: bool) -> None:
        """Give the bytes back, or take as many again; views of them stay what they are."""
        assert self.whole is not None
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size() if filled else 0)


#: Stands for the cache among the arguments of a call that will be repeated with another.
_THE_CACHE = object()


def _without_history(value: Any) -> Any:
    """A tensor's values, which ask for a gradient where it did; `_THE_CACHE` for a cache; anything else as it is."""
    if isinstance(value, Cache):
        return _THE_CACHE
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


class _Written(Exception):
    """Ends a layer's call as soon as its keys and values are written."""


class _Draws:
    """Where the random generators stand: dropout before keys and values (LoRA's) must fall alike in a repetition."""

    def __init__(self, *values: object) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*values)

    def repeat(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)


class _LayerColumns:
    """Keys and values of all passes in one decoder layer.

    Attributes:
        parts: all columns up to each pass's end.
        memory: of keys and of values.
        calls: repeats the layer's call of each pass with another cache, once recorded; what `restore` needs.
    """

    def __init__(self, n_layers: int, length: int) -> None:
        self.n_layers = n_layers
        self.parts: list[Columns] = []
        self.memory = (_Memory(length), _Memory(length))
        self.calls: list[Callable[[Cache], object]] = []
        self.is_released = self.is_restoring = False

    def end(self, pass_index: int) -> int:
        """Columns before those of a pass."""
        return self.parts[pass_index - 1][0].shape[-2] if pass_index else 0

    def end_forward(self, release: bool) -> None:
        if len(self.calls) < len(self.parts):
            return  # not checkpointed: nothing of this is read again
        # A recomputation needs no more than values. With their history they would lead through the graph back here,
        # a circle that the garbage collector cannot see, and a forward without backward would never be freed.
        self.parts = [(_without_history(keys), _without_history(values)) for keys, values in self.parts]
        if release:
            self.is_released = True
            for memory in self.memory:
                memory.resize(filled=False)
        else:
            self.calls.clear()

    def restore(self) -> None:
        """Compute the keys and values again: each pass's call of the layer, ended when it has them.

        All but the last pass's, which nobody reads before its own recomputation has written them.
        """
        for memory in self.memory:
            memory.resize(filled=True)
        self.is_released, self.is_restoring = False, True
        own = _Draws(self.memory[0].whole)  # those of the recomputation that asks, which goes on afterwards
        with torch.no_grad():
            for pass_index, call in enumerate(self.calls[:-1]):
                view = _PassLayer(self, pass_index, keep=True)
                with suppress(_Written):
                    call(Cache(layers=[view] * self.n_layers))  # the layer looks at its own only
        own.repeat()
        self.is_restoring = False
        self.calls.clear()


class _PassLayer(DynamicLayer):
    """One decoder layer's keys and values as seen from one pass.

    `update` may be called again for the same pass, since activation checkpointing runs the layer again in the backward:
    that call reads the same earlier columns and leaves no trace.

    Args:
        columns: shared between the views of the passes.
        pass_index: which pass.
        keep: False for a trial, whose columns no later pass sees.
    """

    def __init__(self, columns: _LayerColumns, pass_index: int, keep: bool) -> None:
        super().__init__()
        self.columns, self.pass_index, self.keep = columns, pass_index, keep
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> Columns:
        columns = self.columns
        if columns.is_restoring:
            for memory, new in zip(columns.memory, (key_states, value_states), strict=True):
                memory.write(new, columns.end(self.pass_index))
            raise _Written
        if columns.is_released:
            columns.restore()
        keys, values = columns.parts[self.pass_index - 1] if self.pass_index else (None, None)
        if not self.keep:
            assert keys is not None and values is not None
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
        key_memory, value_memory = columns.memory
        pair = (_Append.apply(key_memory, key_states, keys), _Append.apply(value_memory, value_states, values))
        if len(columns.parts) == self.pass_index:
            columns.parts.append(pair)
        return pair

    def record(self, call: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Remember how to call the layer again in this pass: with the values alone, without what they came from."""
        if self.keep:
            values = [_without_history(arg) for arg in args]
            options = {name: _without_history(arg) for name, arg in kwargs.items()}
            draws = _Draws(*values, *options.values())

            def repeat(cache: Cache) -> object:
                draws.repeat()
                return call(
                    *(cache if value is _THE_CACHE else value for value in values),
                    **{name: cache if value is _THE_CACHE else value for name, value in options.items()},
                )

            self.columns.calls.append(repeat)

    def get_seq_length(self) -> int:
        return self.columns.end(self.pass_index)


class PassCache:
    """Keys and values of all passes, layer by layer.

    Args:
        n_layers: of the decoder.
        length: columns of all passes together.
    """

    def __init__(self, n_layers: int, length: int) -> None:
        self.layers = [_LayerColumns(n_layers, length) for _ in range(n_layers)]

    def view(self, pass_index: int, keep: bool = True) -> Cache:
        """The cache that the decoder is given in pass `pass_index`; without `keep` its own columns are not stored."""
        return Cache(layers=[_PassLayer(columns, pass_index, keep) for columns in self.layers])

    def end_forward(self, release: bool) -> None:
        """No pass follows, and the caller has no use for the content.

        Args:
            release: give the memory back until the backward recomputes the layers, where they are checkpointed. A
                checkpointed single pass holds each layer's input and no more; neither need the loop, whose keys and
                values follow from these inputs. The price: norm and projections of each layer once more.
        """
        for columns in self.layers:
            columns.end_forward(release)

    def to_dynamic(self, config: object) -> DynamicCache:
        """An ordinary transformers cache with the same content."""
        cache = DynamicCache(config=config)
        for number, columns in enumerate(self.layers):
            cache.update(*columns.parts[-1], number)
        return cache


class _CheckpointedLayer:
    """Mixed into a layer's class: runs the layer under activation checkpointing.

    transformers' own gradient checkpointing drops the cache with no more than a warning, which gives a wrong loss
    here. Non-reentrant, because a reentrant checkpoint reduces a gradient more than once under ZeRO; around the whole
    ``__call__``, so that ZeRO-3's hooks gather the layer's weights for the recomputation as well.
    """

    layer_number: int

    def __call__(self, *args: object, **kwargs: object) -> object:
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        call = super().__call__  # type: ignore[misc]
        # By name in most families, by position in GPT-2's.
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is not None and isinstance(layer := cache.layers[self.layer_number], _PassLayer):
            layer.record(call, *args, **kwargs)
        return checkpoint(call, *args, use_reentrant=False, **kwargs)  # type: ignore[call-overload]


def checkpoint_layers(layers: nn.ModuleList) -> None:
    """Make every layer of the list recompute its activations in the backward. Idempotent."""
    for number, layer in enumerate(layers):
        kind = type(layer)
        if not issubclass(kind, _CheckpointedLayer):
            layer.__class__ = type(f"Checkpointed{kind.__name__}", (_CheckpointedLayer, kind), {"layer_number": number})
