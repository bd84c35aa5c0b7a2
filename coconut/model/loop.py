"""The latent loop as one module, so that ZeRO-3 gathers the decoder's weights once for all of its passes.

    MultimodalCoconut
      base_model ... decoder (embedding, layers, norm)      owns all weights, under transformers' names
      loop: LatentLoop                                      owns only the feedback's; borrows the decoder

ZeRO-3 fetches weights when a module is called and lets them go afterwards. Called layer by layer, K + 1 passes
fetch the decoder K + 1 times over, and a K that changes from step to step (ragged data, stage mixing) invalidates the
record of calls by which DeepSpeed would keep weights for their next use: 1.7 to 6.7 times the weights a step. So where
the decoder fits, the whole loop is a *leaf* for ZeRO-3: its weights come when the loop begins and go when it ends, in
the forward and in the backward, whatever K is. The price is that each rank holds the decoder's weights and gradients
whole meanwhile.

The embedding table stays outside: its gradient is complete only after that of the loop's inputs, which is the moment
at which a leaf lets go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coconut.model.multipass import PassOutput, ThoughtTransform, run_passes
from coconut.model.pass_cache import PassCache
from coconut.model.spans import Segment


class LatentLoop(nn.Module):
    """Runs a decoder over the segments of a batch; `run` is the way to call it.

    Args:
        decoder: a transformers decoder without head; stays where it is, as a part of its model.
        feedback: makes the embeddings that are fed back of hidden states; None feeds them back as they are.

    Attributes:
        iterations: None computes thoughts one after the other, else neighbouring ones together, so many times
            (arXiv 2506.18582).
    """

    def __init__(self, decoder: nn.Module, feedback: nn.Module | None = None) -> None:
        super().__init__()
        # In a tuple: a module in an attribute would be a child, and its weights would be saved twice.
        self._borrowed = (decoder,)
        self.feedback = feedback
        self.iterations: int | None = None
        self._borrowed_parameters: list[tuple[str, nn.Parameter]] = []

    @property
    def decoder(self) -> Any:
        return self._borrowed[0]

    @property
    def is_leaf(self) -> bool:
        """Whether ZeRO-3 treats the loop and the decoder's layers as one module."""
        return bool(getattr(self, "_z3_leaf", False))

    @property
    def _is_gathered_by_layers(self) -> bool:
        """Whether ZeRO-3 counts the calls within each layer, which may then not be broken off in the middle."""
        return not self.is_leaf and any(hasattr(parameter, "ds_id") for parameter in self.decoder.parameters())

    def run(
        self,
        embeds_BLH: Tensor,
        attention_mask_BL: Tensor,
        position_ids: Tensor,
        segments: Sequence[Segment],
        is_latent_BL: Tensor,
        *,
        use_cache: bool = True,
        thought_transform: ThoughtTransform | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> PassOutput:
        """See `run_passes`.

        Args:
            use_cache: return the keys and values. Without it a single pass, which needs none itself, keeps none.
        """
        if torch.is_grad_enabled() and not embeds_BLH.requires_grad:
            # A leaf's gradients are reduced when those of its inputs are there; so they must be asked for.
            embeds_BLH = embeds_BLH.detach().requires_grad_()
        n_layers = self.decoder.config.num_hidden_layers
        cache = PassCache(n_layers, embeds_BLH.shape[1]) if use_cache or len(segments) > 1 else None
        tensors = self(
            embeds_BLH,
            attention_mask_BL=attention_mask_BL,
            position_ids=position_ids,
            segments=segments,
            is_latent_BL=is_latent_BL,
            cache=cache,
            thought_transform=thought_transform,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if cache is not None and not use_cache:
            cache.end_forward(release=not self._is_gathered_by_layers)
        hidden_BLH, thoughts_BKH, *rest = tensors
        n_states = len(rest) - output_attentions * n_layers
        return PassOutput(hidden_BLH, thoughts_BKH, cache, tuple(rest[:n_states]), tuple(rest[n_states:]))

    def forward(self, embeds_BLH: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """`run_passes`, with a flat tuple of tensors as its result: DeepSpeed's and torch's hooks look at no other."""
        # As a leaf the decoder's own hooks must not fire: they would make each pass a call of its own again.
        decoder = self.decoder.forward if self.is_leaf else self.decoder
        output = run_passes(decoder, embeds_BLH, feedback=self.feedback, **options)
        return (output.hidden_BLH, output.thoughts_BKH, *output.hidden_states, *output.attentions)

    # -- ZeRO-3 --

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Its own parameters, and as a leaf those it borrows too: this is what DeepSpeed asks a leaf for.

        The parameters of the whole model are listed module by module, so nothing is counted twice.
        """
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if self.is_leaf and recurse:
            yield from self._borrowed_parameters

    def become_leaf(self) -> None:
        """Ask ZeRO-3 to treat the loop as one module; before the engine is built."""
        self._z3_leaf = True
        # Once: to touch a weight inside a forward is, to DeepSpeed, to use it there.
        table = {id(parameter) for parameter in self.decoder.get_input_embeddings().parameters()}
        self._borrowed_parameters = [pair for pair in self.decoder.named_parameters() if id(pair[1]) not in table]

    def unhook_decoder(self) -> None:
        """Take DeepSpeed's hooks off what runs inside the leaf; after the engine is built.

        They would record every call of every pass, and release weights that the leaf holds.
        """
        embedding = self.decoder.get_input_embeddings()
        for module in self.decoder.modules():
            if module is not embedding:
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Hold ZeRO-3's parameters whole inside, for reading, though modules that use them are called and left.

    Every rank must enter and leave together. What is not partitioned stays as it is.
    """
    partitioned: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        for parameter in partitioned:
            parameter.ds_active_sub_modules.add(_HOLDER)
        try:
            yield
        finally:
            for parameter in partitioned:
                parameter.ds_active_sub_modules.discard(_HOLDER)


@contextmanager
def without_zero_hooks(module: nn.Module, *, when: bool) -> Iterator[None]:
    """Call a module whose weights are `gathered` without DeepSpeed's taking note of it, `when` so.

    It compares the calls of all ranks, and gives up where they differ in number: as those of decoding do.
    """
    kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
    try:
        for part in module.modules() if when else ():
            for hooks in (part._forward_hooks, part._forward_pre_hooks):
                ours = {key: hook for key, hook in hooks.items() if hook.__module__.startswith("deepspeed.")}
                if ours:
                    kept.append((hooks, dict(hooks)))
                    for key in ours:
                        del hooks[key]
        yield
    finally:
        for hooks, all_of_them in kept:
            hooks.clear()
            hooks.update(all_of_them)  # in their order


#: Stands for "somebody uses it" among the ids of modules (from 0) that DeepSpeed counts a parameter's users by.
_HOLDER = -1
