"""The memory of one forward and backward, without doing it: the model's own code on tensors that hold no values.

    model and batch on torch's meta device --forward, backward--> every allocation seen --> bytes alive at the peak

What runs is what trains (vision tower, latent loop with its cache, checkpointing, chunked loss), so saved activations,
recomputation and the passing tensors of the backward are counted as they come and go. Two things need values, and are
replaced: attention, by a function that saves what the fused kernels save; and questions to values, which are answered
as for a padded batch (several rows) or one without padding (one row).

Shapes: B rows, L columns, H hidden size, P image tiles, N label tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coconut.model import MultimodalCoconut
from coconut.model.adapters import LoraSettings, choose_trained
from coconut.model.loading import build_outline
from coconut.model.loss import chunked_loss, n_chunks
from coconut.model.spans import cut_into_passes

#: Layers of a model that stands for a deep one.
FEW = 3
PARTS = ("gradients", "activations", "logits", "cache")


@dataclass(frozen=True)
class BatchShape:
    """What of a micro-batch its memory hangs on."""

    rows: int
    columns: int  # tokens of the longest row, image and latent tokens included
    labels: int  # label tokens of all rows
    latents: int = 0  # latent columns
    tiles: int = 0  # image tiles of all rows


@dataclass
class LiveBytes:
    """Bytes of tensors that are alive, by part."""

    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    part: str = "activations"  # of what is allocated at the moment

    def add(self, part: str, n_bytes: int) -> None:
        self.now[part] += n_bytes
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)


class _Watch(TorchDispatchMode):
    """Notes each storage that an operation makes, until it is freed."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live
        self.sizes: dict[int, tuple[str, int]] = {}  # of living storages, by their address
        self.known: set[int] = set()  # storages that were there before
        self.weight_shapes: set[tuple[int, ...]] = set()  # of trained matrices, and of what gradients are made from
        self.is_backward = False

    def ignore(self, module: nn.Module) -> None:
        """Weights and buffers are counted by whoever holds them."""
        self.known |= {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
        shapes = [tuple(parameter.shape) for parameter in trained if parameter.dim() > 1]
        self.weight_shapes = {*shapes, *(shape[::-1] for shape in shapes)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                # A weight's gradient is complete, and can be reduced, only when all passes have brought their share.
                is_share = self.is_backward and tuple(value.shape) in self.weight_shapes
                self.note(value.untyped_storage(), "gradients" if is_share else self.live.part)
        return result

    def note(self, storage: torch.UntypedStorage, part: str) -> None:
        address = storage._cdata
        if address in self.sizes or address in self.known:
            return
        self.sizes[address] = (part, storage.nbytes())
        self.live.add(*self.sizes[address])
        weakref.finalize(storage, self._freed, address)

    def _freed(self, address: int) -> None:
        part, n_bytes = self.sizes.pop(address)
        self.live.add(part, -n_bytes)

    def resized(self, storage: torch.UntypedStorage, n_bytes: int) -> None:
        address = storage._cdata
        if address in self.sizes:
            part, before = self.sizes[address]
            self.sizes[address] = (part, n_bytes)
            self.live.add(part, n_bytes - before)

    def move(self, tensor: Tensor, part: str) -> None:
        """A storage belongs to another part than was thought."""
        address = tensor.untyped_storage()._cdata
        if address in self.sizes:
            before, size = self.sizes[address]
            self.sizes[address] = (part, size)
            self.live.now[before] -= size
            self.live.now[part] += size


class _FusedAttention(torch.autograd.Function):
    """Allocates and saves what the fused kernels do: no [B, heads, L, L] of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        if mask is not None and mask.dtype == torch.bool:  # the kernels add a mask in the queries' own dtype
            mask = mask.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, log_sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> Tensor:
    """In the place of `torch.nn.functional.scaled_dot_product_attention`."""
    return _FusedAttention.apply(query, key, value, attn_mask)


def outline_model(hf_config: Any, freeze: Sequence[str] = (), lora: LoraSettings | None = None) -> MultimodalCoconut:
    """A model of transformers' configuration `hf_config` to simulate with: shapes without values, in float32.

    Raises:
        ConfigError: this model cannot be frozen so, or take such adapters.
    """
    base_model = build_outline(hf_config)
    with torch.device("meta"):
        model = MultimodalCoconut(base_model, 0, 1, 2, 3)
        choose_trained(model, freeze, lora, seed=0)
        return model.train()


def simulate(
    model: MultimodalCoconut,
    shape: BatchShape,
    keeps_gradient: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> LiveBytes:
    """Forward and backward of one micro-batch.

    Args:
        model: on the meta device, in training mode, checkpointed if the run's is.
        shape: of the micro-batch.
        keeps_gradient: whether a parameter's gradient stays until the backward ends; others go once they are complete,
            as ZeRO reduces and drops them.

    Returns:
        The bytes alive at the peak, weights not counted.
    """
    live = LiveBytes()
    watch = _Watch(live)
    watch.ignore(model)
    hooks = [
        parameter.register_post_accumulate_grad_hook(_after_gradient(watch, keeps_gradient(parameter)))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        with watch, _without_values(watch, is_padded=shape.rows > 1):
            with torch.device("meta"):
                loss = _forward(model, shape, watch)
            watch.is_backward = True
            loss.backward()
            del loss
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return live


def simulate_deep(
    model: MultimodalCoconut, shape: BatchShape, keeps_gradient: Callable[[nn.Parameter], bool]
) -> dict[str, int]:
    """The peak of `simulate`, for models of many layers.

    Layers are alike, and at the peak, where the first pass is about to be gone back through, each holds its share. So
    three models with few layers tell what a layer of the decoder and one of the vision tower add.
    """
    decoder, vision = model.backbone.decoder_layers, model.backbone.vision_layers
    depth, height = len(decoder), len(vision)

    def peak(n_decoder: int, n_vision: int) -> dict[str, int]:
        with _only(decoder, n_decoder, model.backbone.decoder.config), _only(vision, n_vision):
            return simulate(model, shape, keeps_gradient).peak

    few_decoder, few_vision = min(depth, FEW), min(height, FEW)
    base = peak(few_decoder, few_vision)
    parts = dict(base)
    for more, missing, other in (
        ((few_decoder + 2, few_vision), depth - few_decoder, depth),
        ((few_decoder, few_vision + 2), height - few_vision, height),
    ):
        if missing > 0:
            added = min(2, other - FEW)
            deeper = peak(min(more[0], depth), min(more[1], height))
            for part in parts:
                parts[part] += (deeper[part] - base[part]) * missing // added
    return parts


@contextmanager
def _only(layers: nn.ModuleList, n: int, config: Any = None) -> Iterator[None]:
    """Inside, a list has its first `n` layers, and `config` says so."""
    left_out = list(layers[n:])
    del layers[n:]
    if config is not None:
        config.num_hidden_layers = n
    try:
        yield
    finally:
        layers.extend(left_out)
        if config is not None:
            config.num_hidden_layers = len(layers)


def _forward(model: MultimodalCoconut, shape: BatchShape, watch: _Watch) -> Tensor:
    """As `MultimodalCoconut.forward` with ``loss_only``, on a batch that is known by its shape alone."""
    rows, columns = shape.rows, shape.columns
    ids_BL = torch.empty(rows, columns, dtype=torch.long)
    mask_BL = torch.empty(rows, columns, dtype=torch.long)
    backbone = model.backbone
    embeds_BLH = backbone.embed(ids_BL)
    if backbone.tile_size:  # called without an image too, on a black tile
        pixels = torch.empty(max(shape.tiles, 1), 3, backbone.tile_size, backbone.tile_size, dtype=torch.uint8)
        features_PTH = model.encode_images(pixels)
        if shape.tiles:
            places = torch.empty(features_PTH.shape[0] * features_PTH.shape[1], dtype=torch.long)
            embeds_BLH = embeds_BLH.index_put((places, places), features_PTH.flatten(0, 1).to(embeds_BLH.dtype))
    first = max(1, columns - shape.latents - max(shape.labels // rows, 1))
    latent_columns = [] if model.loop.iterations == 0 else list(range(first, first + shape.latents))
    is_latent_BL = torch.zeros(rows, columns, dtype=torch.bool, device="cpu")
    is_latent_BL[:, latent_columns] = True
    output = model.loop.run(
        embeds_BLH,
        mask_BL,
        backbone.position_ids(ids_BL, mask_BL),
        cut_into_passes(latent_columns, is_latent_BL, None, model.loop.iterations),
        torch.empty(rows, columns, dtype=torch.bool),
        use_cache=False,
    )
    for layer in output.cache.layers if output.cache is not None else ():
        for memory in layer.memory:
            assert memory.whole is not None
            watch.move(memory.whole, "cache")
    watch.live.part = "logits"
    places_N = torch.empty(shape.labels, dtype=torch.long)
    hidden_NH = output.hidden_BLH[:, :-1][places_N, places_N]
    hidden_NH.register_hook(lambda _: setattr(watch.live, "part", "activations"))
    return chunked_loss(backbone.head, hidden_NH, torch.empty_like(places_N), n_chunks(shape.labels))


def _after_gradient(watch: _Watch, stays: bool) -> Callable[[Tensor], None]:
    def run(parameter: Tensor) -> None:
        assert parameter.grad is not None
        watch.move(parameter.grad, "gradients")
        if not stays:
            parameter.grad = None

    return run


@contextmanager
def _without_values(watch: _Watch, is_padded: bool) -> Iterator[None]:
    """Replaces what needs values. By assignment: a function mode would be off during the backward, which recomputes."""

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """The cache gives its memory back by resizing, which is no operation that a dispatch mode sees."""
        watch.resized(storage, size)
        return storage  # on the meta device there is nothing behind it

    replaced: tuple[tuple[Any, str, Any], ...] = (
        (F, "scaled_dot_product_attention", _fused_attention),
        (Tensor, "__bool__", lambda mask: not is_padded),  # "is every position of the mask a token?"
        (torch.UntypedStorage, "resize_", resized),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
