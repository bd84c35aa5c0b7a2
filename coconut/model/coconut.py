"""`MultimodalCoconut`: a vision-language model that thinks in continuous latent space.

    ids + tiles --vision tower, once--> embeddings --loop.LatentLoop--> hidden --label positions--> loss

Shapes: B rows, L columns, H hidden size, P image tiles of the batch, T image tokens a tile, K latent columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from coconut.model import loading
from coconut.model.auxiliary import AuxiliaryLoss, ThoughtContext
from coconut.model.backbones import normalise_pixels, wrap_backbone
from coconut.model.feedback import build_feedback
from coconut.model.generate import (
    forward_from_cache,
    generation_settings,
    left_pad,
    think_then_decode,
    wrap_questions,
)
from coconut.model.loop import LatentLoop, gathered
from coconut.model.loss import label_loss, label_positions, n_chunks
from coconut.model.multipass import PassOutput, ThoughtTransform
from coconut.model.norms import NormMeter
from coconut.model.pass_cache import checkpoint_layers
from coconut.model.spans import check_shapes, count_calls, cut_into_passes, latent_columns
from coconut.model.tiles import black_tile, flatten_tiles, insert_images, real_tiles, tiles_a_row
from coconut.types import ConfigError, DataError, PromptTemplate, StageSpec
from coconut.utils.distributed import all_reduce_max, get_world_size


@dataclass
class CoconutOutput(CausalLMOutputWithPast):
    """transformers' output, and the thoughts [B, K, H] when they were asked for."""

    thoughts: Tensor | None = None


class MultimodalCoconut(nn.Module):
    """Chain of continuous thought over a vision-language (or text-only) transformers model.

    Args:
        base_model: InternVL in transformers' format, or any causal language model.
        latent_token_id: id of ``<|latent|>``; its embedding is replaced by the previous hidden state.
        start_latent_id: id of ``<|start-latent|>``.
        end_latent_id: id of ``<|end-latent|>``.
        eos_token_id: id that ends a generated answer.

    Attributes:
        lockstep: make the same calls on every rank whatever its batch holds, as ZeRO requires: the number of passes
            and head calls is agreed before each forward, and the vision tower is always called. The training engine
            sets it; every rank must then call forward equally often.
        prompt_template: how raw questions are wrapped by `generate`; set by `from_pretrained` and the trainer.
        stage_spec: the curriculum stage the weights were trained at; gives `generate` its number of thoughts.
        norms: of the thoughts and of the text's embeddings, added up in training mode.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        latent_token_id: int,
        start_latent_id: int,
        end_latent_id: int,
        eos_token_id: int,
    ) -> None:
        super().__init__()
        if len({latent_token_id, start_latent_id, end_latent_id}) < 3:
            raise ConfigError(
                f"latent, start and end token have the ids {latent_token_id}, {start_latent_id} and {end_latent_id}; "
                "they must be three different tokens"
            )
        self.base_model = base_model
        self.backbone = wrap_backbone(base_model)
        self.latent_feedback = "hidden"
        self.embedding_norm: float | None = None  # mean over the table's rows; only where the feedback needs it
        # After base_model, since ZeRO-3 gives a weight to the leaf that it meets last.
        self.loop = LatentLoop(self.backbone.decoder)
        self.auxiliary_losses: dict[str, tuple[AuxiliaryLoss, float]] = {}
        self.norms = NormMeter()
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.hidden_size: int = self.backbone.text_config.hidden_size
        self.tokens_per_patch: int = self.backbone.tokens_per_patch
        self.lockstep = False
        self.prompt_template: PromptTemplate | None = None
        self.stage_spec: StageSpec | None = None
        self.metadata: dict[str, Any] = {}  # saved with the weights: data, curriculum, scores
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.zero3_config: Any = None  # transformers forgets that it runs under ZeRO-3 when this object dies
        self.register_buffer("pixel_mean", torch.tensor(self.backbone.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.backbone.pixel_std).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return next(self.base_model.parameters()).device

    @property
    def latent_ids(self) -> tuple[int, int, int]:
        """Ids of the start, latent and end tokens."""
        return self.start_latent_id, self.latent_token_id, self.end_latent_id

    @classmethod
    def from_pretrained(cls, model_id: str | Path, config: Any = None) -> MultimodalCoconut:
        """Load a hub id or folder: a plain transformers checkpoint, or one saved by `save_pretrained`.

        Args:
            model_id: hub id or local folder.
            config: optional run configuration; gives dtype, attention backend, and whether the weights are
                partitioned while they load (ZeRO-3).

        Raises:
            ConfigError: no such folder, or a model family that is not supported.
            CheckpointError: the folder's files are damaged.
        """
        return loading.load_model(cls, model_id, config)

    def save_pretrained(self, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a folder that plain transformers loads, with ``coconut.json`` beside the weights.

        Args:
            path: the folder.
            state_dict: gathered weights under this module's names; needed when they are partitioned (ZeRO-3).
        """
        loading.save_model(self, Path(path), state_dict)

    def set_latent_feedback(self, name: str, embedding_norm: float | None = None) -> None:
        """Choose what is fed back as a thought: hidden (the paper), normed, projector, none (`coconut.model.feedback`).

        Args:
            name: one of these.
            embedding_norm: what normed thoughts are scaled to; by default the mean norm of the embedding table's rows.
        """
        if name in ("normed", "projector") and embedding_norm is None:
            weight = self.base_model.get_input_embeddings().weight
            with gathered([weight]), torch.no_grad():
                embedding_norm = float(weight.float().norm(dim=1).mean())
        feedback = build_feedback(name, embedding_norm or 0.0, self.hidden_size)
        self.loop.feedback = None if feedback is None else feedback.to(device=self.device, dtype=self.base_model.dtype)
        self.latent_feedback, self.embedding_norm = name, embedding_norm

    def set_latent_passes(self, iterations: int | None) -> None:
        """None computes thoughts one after the other (the paper); a number, all together so many times (Jacobi).

        With as many iterations as a span has thoughts both are equal (arXiv 2506.18582). Zero reads the latent tokens
        with their own embeddings, in the pass of the tokens around them; that goes with latent_feedback none only.
        """
        if iterations is not None and iterations < 0:
            raise ConfigError(f"the number of passes is {iterations}; give 1 or more, 0 for pauses, or None")
        if iterations == 0 and self.latent_feedback != "none":
            raise ConfigError(f"latent_feedback {self.latent_feedback} needs passes to be computed in; choose none")
        self.loop.iterations = iterations

    def calls_of_thoughts(self, n_latents: int) -> int:
        """Sequential calls of the decoder that a span of so many latents takes before the text after it is read."""
        return n_latents if self.loop.iterations is None else min(n_latents, self.loop.iterations)

    def thought_columns(self, input_ids: Tensor, attention_mask: Tensor) -> list[int]:
        """The columns that hold a latent to be computed in some row."""
        columns = latent_columns(input_ids, self.latent_token_id, attention_mask)
        return [] if self.loop.iterations == 0 else columns

    def add_auxiliary_loss(self, name: str, loss: AuxiliaryLoss, weight: float) -> None:
        """Add `weight` times a loss on the thoughts to the training loss (see `coconut.model.auxiliary`)."""
        if isinstance(loss, nn.Module):
            self.add_module(f"auxiliary_{len(self.auxiliary_losses)}", loss)
        self.auxiliary_losses[name] = (loss, weight)

    @property
    def text_parameters(self) -> list[nn.Parameter]:
        """Those of embedding, decoder and head: all that generating text takes."""
        modules = (self.backbone.decoder, self.base_model.get_input_embeddings(), self.backbone.head)
        return list({id(p): p for module in modules for p in module.parameters()}.values())

    @property
    def text_weights_held(self) -> bool:
        """Whether the loop is a leaf, and so fits as a whole."""
        return self.loop.is_leaf and any(hasattr(parameter, "ds_id") for parameter in self.loop.parameters())

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward: per decoder layer and pass, and in the vision tower."""
        checkpoint_layers(self.backbone.decoder_layers)
        checkpoint_layers(self.backbone.vision_layers)

    def encode_images(self, pixel_values: Tensor, num_patches: Tensor | None = None) -> Tensor:
        """Visual features [P, T, H] of tiles [P, 3, height, width] (uint8, or floats normalised already).

        Args:
            pixel_values: tiles; five dimensions [B, patches, 3, height, width] are flattened.
            num_patches: [B] real tiles of each row, for five dimensions; None means that all are real.
        """
        pixels_PCHW = flatten_tiles(pixel_values, num_patches).to(self.device)
        dtype = self.base_model.dtype
        return self.backbone.encode_images(normalise_pixels(pixels_PCHW, self.pixel_mean, self.pixel_std, dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        num_patches: Tensor | None = None,
        visual_features: Tensor | None = None,
        loss_only: bool = False,
        num_items_in_batch: float | Tensor | None = None,
        output_thoughts: bool = False,
        thought_transform: ThoughtTransform | None = None,
    ) -> CoconutOutput | tuple[Any, ...]:
        """Logits, and the loss when labels are given (arXiv 2412.06769, section 3).

        Args:
            input_ids: [B, L] token ids; every ``<|latent|>`` is computed, not looked up.
            pixel_values: [P, 3, height, width] tiles in the order of their image tokens, or [B, patches, 3, ...].
            attention_mask: [B, L], 1 for tokens; padding may stand on either side.
            position_ids: [B, L]; by default they count tokens and skip padding.
            image_flags: [B, 1], 0 for rows whose tiles are placeholders to be dropped (five-dimensional
                ``pixel_values`` only).
            past_key_values: a transformers cache that `input_ids` continue; then ``attention_mask`` covers cached and
                new tokens [B, cached + L]. Not together with latents, images or ``loss_only``.
            labels: [B, L], -100 where nothing is to be learnt.
            use_cache: return the keys and values as a transformers cache.
            output_attentions, output_hidden_states: as in transformers, at full length.
            return_dict: False returns a tuple.
            num_patches: [B] real tiles of each row.
            visual_features: [P, T, H] from `encode_images`, in place of ``pixel_values``.
            loss_only: compute logits at label positions only, and return none.
            num_items_in_batch: divisor of the summed loss; by default the batch's own label tokens.
            output_thoughts: return the thoughts [B, K, H].
            thought_transform: replaces each thought before it is fed back.

        Raises:
            DataError: images and image tokens do not match, or a latent has no token before it.
        """
        if past_key_values is not None:
            others = {
                "pixel_values": pixel_values,
                "visual_features": visual_features,
                "num_items_in_batch": num_items_in_batch,
                "thought_transform": thought_transform,
                "loss_only": loss_only or None,
                "output_thoughts": output_thoughts or None,
            }
            if given := [name for name, value in others.items() if value is not None]:
                raise DataError(f"past_key_values cannot be given together with {', '.join(given)}")
            options = {
                "labels": labels,
                "use_cache": use_cache,
                "output_attentions": output_attentions,
                "output_hidden_states": output_hidden_states,
                "return_dict": return_dict is not False,
            }
            return forward_from_cache(self, input_ids, attention_mask, position_ids, past_key_values, options)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_shapes(input_ids, attention_mask, labels)
        if pixel_values is not None and visual_features is not None:
            raise DataError("give either pixel_values or visual_features, not both")
        columns = self.thought_columns(input_ids, attention_mask)
        if output_attentions and self.backbone.text_config._attn_implementation != "eager":
            raise ConfigError(
                "output_attentions needs attn_implementation eager, as no other kernel keeps its weights; set it in "
                "the configuration, or call model.base_model.set_attn_implementation('eager')"
            )
        if labels is not None:
            # A padded position has nothing to predict, whatever its label says, and predicts nothing.
            before = nn.functional.pad(attention_mask[:, :-1], (1, 0), value=0)
            labels = labels.masked_fill((attention_mask == 0) | (before == 0), -100)
        chunks = n_chunks(int(label_positions(labels).sum())) if labels is not None else 1
        visual_features, chunks, n_calls = self.before_the_loop(
            input_ids, columns, real_tiles(pixel_values, num_patches, image_flags), visual_features, chunks
        )
        output = self.run_loop(
            input_ids,
            attention_mask,
            columns,
            visual_features,
            n_calls,
            position_ids=position_ids,
            use_cache=bool(use_cache),
            thought_transform=thought_transform,
            output_hidden_states=bool(output_hidden_states),
            output_attentions=bool(output_attentions),
        )
        head, hidden_BLH = self.backbone.logits, output.hidden_BLH
        logits = None if loss_only else head(hidden_BLH)
        loss = None
        if labels is not None:
            if num_items_in_batch is None:
                num_items_in_batch = label_positions(labels).sum().clamp(min=1)
            if logits is None:
                total = label_loss(head, hidden_BLH, labels, chunks)
            else:
                total = label_loss(nn.Identity(), logits, labels)
            if self.training and self.auxiliary_losses:
                is_thought_BK = input_ids[:, columns] == self.latent_token_id
                context = ThoughtContext(
                    output.thoughts_BKH, is_thought_BK, hidden_BLH, input_ids, attention_mask, labels, visual_features
                )
                total = total + sum(weight * auxiliary(context) for auxiliary, weight in self.auxiliary_losses.values())
            loss = total / num_items_in_batch
        result = CoconutOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.cache.to_dynamic(self.backbone.text_config) if use_cache and output.cache else None,
            hidden_states=output.hidden_states or None,
            attentions=output.attentions or None,
            thoughts=output.thoughts_BKH if output_thoughts else None,
        )
        return result.to_tuple() if return_dict is False else result

    def before_the_loop(
        self,
        input_ids: Tensor,
        columns: list[int],
        pixel_values: Tensor | None,
        visual_features: Tensor | None,
        chunks: int = 1,
    ) -> tuple[Tensor | None, int, int | None]:
        """What all ranks agree on, and the pictures: visual features [P, T, H], calls of the head, of the decoder.

        An image nowhere in the batch still leaves the vision tower to be called: ZeRO counts calls on every rank, and
        ZeRO-3 would apply the last step's gradient once more to a parameter that got none in this one.
        """
        n_calls = None
        if self.lockstep and get_world_size() > 1:
            own = count_calls(columns, input_ids == self.latent_token_id, self.loop.iterations)
            if self.latent_feedback == "projector":
                own = max(own, 2)  # its weights must get a gradient in every step, as the vision tower's
            n_calls, chunks = (int(v) for v in all_reduce_max([own, chunks]))
        if pixel_values is not None:
            visual_features = self.encode_images(pixel_values)
        elif self.lockstep and self.backbone.tile_size > 0:
            nothing_0TH = self.encode_images(black_tile(self.backbone.tile_size))[:0]
            visual_features = nothing_0TH if visual_features is None else visual_features
        return visual_features, chunks, n_calls

    def run_loop(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        columns: list[int],
        visual_features: Tensor | None,
        n_calls: int | None,
        *,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        thought_transform: ThoughtTransform | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> PassOutput:
        """Embed, then run the passes all ranks agreed on."""
        length = input_ids.shape[1]
        # A very short batch is widened by padding so that it can be cut as often as the others.
        if n_calls is not None and (pad := n_calls + len(columns) - length) > 0:
            input_ids = nn.functional.pad(input_ids, (0, pad), value=self.eos_token_id)
            attention_mask = nn.functional.pad(attention_mask, (0, pad), value=0)
            position_ids = None if position_ids is None else nn.functional.pad(position_ids, (0, pad), value=0)
        if position_ids is None:
            position_ids = self.backbone.position_ids(input_ids, attention_mask)
        embeds_BLH = self.backbone.embed(input_ids)
        embeds_BLH = insert_images(embeds_BLH, input_ids, self.backbone.image_token_id, visual_features)
        is_latent_BL = input_ids == self.latent_token_id
        is_thought_BL = is_latent_BL & (self.latent_feedback != "none")
        output = self.loop.run(
            embeds_BLH,
            attention_mask,
            position_ids,
            cut_into_passes(columns, is_latent_BL, n_calls, self.loop.iterations),
            is_thought_BL,
            use_cache=use_cache,
            thought_transform=thought_transform,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if self.training:
            is_text_BL = (attention_mask > 0) & ~is_latent_BL
            if self.backbone.image_token_id is not None:
                is_text_BL &= input_ids != self.backbone.image_token_id
            self.norms.add(output.thoughts_BKH, is_thought_BL[:, columns], embeds_BLH, is_text_BL)
        output.hidden_BLH = output.hidden_BLH[:, :length]
        return output

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_flags: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        *,
        num_patches: Tensor | None = None,
        n_latents: int | None = None,
        wrap_prompt: bool | None = None,
        thought_transform: ThoughtTransform | None = None,
        **generate_kwargs: Any,
    ) -> Tensor:
        """Think, then answer: new token ids [B, T] only, right-padded.

        The latents run once, with the cache; transformers' own generation decodes from there, so sampling, beams,
        stopping criteria and streamers work as they do there.

        Args:
            pixel_values, num_patches, image_flags, visual_features: as in `forward`; not both pixels and features.
            input_ids: [B, L] prompts. Raw question ids without any special token are wrapped in the training prompt,
                with image tokens and latents placed; prompts that hold special tokens are used as they are.
            attention_mask: [B, L]; padding on the right is moved to the left.
            generation_config: transformers' settings; `generate_kwargs` win over it, and it over the defaults
                (max_new_tokens 100, do_sample True, temperature 0.7, top_p 0.9, top_k 50).
            n_latents: thoughts of a wrapped prompt; by default those of the checkpoint's stage.
            wrap_prompt: wrap (True) or do not (False), instead of looking for special tokens.
            thought_transform: replaces each thought before it is fed back.

        Raises:
            DataError: no input_ids, pixels and features both given, or images without a place.
        """
        if input_ids is None:
            raise DataError("generate needs input_ids: the ids of the question, or of a whole prompt")
        if pixel_values is not None and visual_features is not None:
            raise DataError("give either pixel_values or visual_features to generate, not both")
        input_ids = input_ids.to(self.device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        tiles_B = tiles_a_row(pixel_values, visual_features, num_patches, image_flags, input_ids.shape[0])
        input_ids, mask = wrap_questions(self, input_ids, mask, tiles_B, n_latents, wrap_prompt)
        pixel_values = real_tiles(pixel_values, num_patches, image_flags)
        input_ids, mask = left_pad(input_ids, mask)
        if bool((input_ids[:, -1] == self.latent_token_id).any()):
            raise DataError("a prompt ends with a latent token; end the span with <|end-latent|>")
        if self.backbone.image_token_id is not None and bool((input_ids[:, -1] == self.backbone.image_token_id).any()):
            raise DataError("a prompt ends with an image token; a question has to follow it")
        columns = self.thought_columns(input_ids, mask)
        settings = generation_settings(generation_config, generate_kwargs, self.eos_token_id)
        extra = {k: v for k, v in generate_kwargs.items() if not hasattr(settings, k)}
        return think_then_decode(
            self, input_ids, mask, columns, pixel_values, visual_features, thought_transform, settings, extra
        )
