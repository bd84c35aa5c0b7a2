"""Loading and saving a `MultimodalCoconut`: ordinary transformers folders with one file of ours beside the weights.

FOLDER/config.json  model.safetensors  tokenizer ...      what plain transformers reads
FOLDER/coconut.json                                        latent ids, prompt template, stage, metadata
FOLDER/custom_generate/generate.py                         for `generate` in plain transformers, with trust_remote_code
FOLDER/coconut.safetensors                                 weights that transformers does not know, where there are any
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from coconut.config.deepspeed import zero_stage
from coconut.model import adapters, custom_generate
from coconut.model.auxiliary import load_auxiliary_loss
from coconut.model.backbones import BACKBONES, backbone_class, original_internvl
from coconut.model.backbones.base import Backbone
from coconut.model.backbones.internvl import InternVLBackbone
from coconut.types import CheckpointError, ConfigError, PromptTemplate, StageSpec
from coconut.utils.distributed import get_world_size, init_distributed_training, is_of_lost_rank
from coconut.utils.logging import get_logger
from coconut.utils.tokenizer import load_tokenizer, special_token_ids

if TYPE_CHECKING:
    from coconut.model.coconut import MultimodalCoconut

logger = get_logger(__name__)

METADATA_FILE = "coconut.json"
OWN_WEIGHTS_FILE = "coconut.safetensors"
BASE_PREFIX = "base_model."


def load_model(cls: type[MultimodalCoconut], model_id: str | Path, config: Any = None) -> MultimodalCoconut:
    """See `MultimodalCoconut.from_pretrained`."""
    tokenizer = load_tokenizer(str(model_id))
    start_id, latent_id, end_id = special_token_ids(tokenizer)
    hf_config, raw_config, image_token_id = _read_config(model_id, tokenizer)
    adapter = backbone_class(hf_config.model_type)
    options: dict[str, Any] = {"dtype": "auto"}
    keep_alive = None
    if config is not None:
        options["dtype"] = torch.bfloat16 if config.bf16 else torch.float32
        options["attn_implementation"] = config.attn_implementation
        keep_alive = _enter_zero3(config, hf_config)
    try:
        if image_token_id is not None:
            base_model = original_internvl.load_original(str(model_id), raw_config, image_token_id, options)
        else:
            base_model = adapter.auto_class.from_pretrained(str(model_id), **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_of_lost_rank(error):  # nothing is wrong with the weights: the scheduler may start the run again
            raise
        raise CheckpointError(f"cannot load weights from {str(model_id)!r}: {error}") from error
    init_token = getattr(config, "latent_init_token", None) if config is not None else None
    _add_embeddings(base_model, tokenizer, (start_id, latent_id, end_id), init_token)
    model = cls(base_model, latent_id, start_id, end_id, tokenizer.eos_token_id)
    model.zero3_config = keep_alive
    _read_metadata(model, Path(model_id))
    if config is not None:
        configure(model, config)
    _read_own_weights(model, Path(model_id))
    if config is not None:
        adapters.choose_trained(model, config.freeze, adapters.LoraSettings.from_config(config), config.seed)
    return model


def load_outline(model_id: str | Path, tokenizer: Any) -> Backbone:
    """A model without its weights (on torch's meta device): for its configuration and its number of image tokens.

    Raises:
        ConfigError: no such folder, or a model family that is not supported.
    """
    hf_config, _, _ = _read_config(model_id, tokenizer)
    return backbone_class(hf_config.model_type)(build_outline(hf_config))


def build_outline(hf_config: Any, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """The transformers model of a configuration on torch's meta device: shapes without values."""
    auto_class = backbone_class(hf_config.model_type).auto_class
    build = getattr(auto_class, "_from_config", None) or auto_class.from_config  # of a class, of an Auto class
    with torch.device("meta"):
        return build(hf_config, attn_implementation=attn_implementation)


def check_family(model_id: str | Path, tokenizer: Any) -> None:
    """Read a model's configuration, and nothing else.

    Raises:
        ConfigError: no such folder, or a model family that is not supported.
    """
    model_type = _read_config(model_id, tokenizer)[0].model_type
    if model_type not in BACKBONES and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = ", ".join([*BACKBONES, "and what transformers has as a causal language model"])
        raise ConfigError(f"model_id {str(model_id)!r} is of the family {model_type!r}; supported are {known}")


def _read_config(model_id: str | Path, tokenizer: Any) -> tuple[Any, dict[str, Any], int | None]:
    """transformers' configuration, the file as it is, and in the original InternVL format the image token's id."""
    try:
        raw_config, _ = PreTrainedConfig.get_config_dict(str(model_id))
        if raw_config.get("model_type") != original_internvl.MODEL_TYPE:
            return AutoConfig.from_pretrained(str(model_id)), raw_config, None
        image_token_id = tokenizer.convert_tokens_to_ids(original_internvl.CONTEXT_TOKEN)
        return original_internvl.convert_config(raw_config, image_token_id), raw_config, image_token_id
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model_id {str(model_id)!r} has no readable config.json: {str(error).partition(chr(10))[0]}"
        ) from error


def configure(model: MultimodalCoconut, config: Any) -> None:
    """What the run asks for wins over what the checkpoint was trained with, so that training may go on differently."""
    feedback = "none" if config.method.startswith("pause") else config.latent_feedback
    iterations = config.jacobi_iterations if config.latent_passes == "jacobi" else None
    if config.method in ("pause", "pause_as_thought"):
        iterations = 0
    elif config.method == "pause_multipass":
        iterations = None
    if feedback != model.latent_feedback:
        model.set_latent_passes(None)
        model.set_latent_feedback(feedback)
    model.set_latent_passes(iterations)
    for path, weight in config.auxiliary_losses.items():
        model.add_auxiliary_loss(path, load_auxiliary_loss(path), weight)


def _enter_zero3(config: Any, hf_config: Any) -> Any:
    """Tell transformers to partition the weights while it loads them, when the run uses ZeRO-3."""
    if not config.deepspeed or zero_stage(config.deepspeed) != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    from coconut.config.deepspeed import resolve_ds_config

    init_distributed_training(force=True)  # zero.Init needs a group, of one rank where there is no launcher
    hidden_size = hf_config.get_text_config(decoder=True).hidden_size
    return HfDeepSpeedConfig(resolve_ds_config(config, world_size=get_world_size(), hidden_size=hidden_size))


def _add_embeddings(
    base_model: PreTrainedModel, tokenizer: Any, special_ids: tuple[int, ...], init_token: str | None
) -> None:
    """Let the tokens that `load_tokenizer` had to add start from the embedding of an existing token.

    A random row would start far from every trained one; the original starts from an ordinary token too. The line
    break is the default, because that is what stands between two steps. Some checkpoints have spare rows, so a table
    that is large enough still needs its rows set.
    """
    if not tokenizer.added_latent_tokens:
        return
    rows = _embedding_rows(base_model)
    source_ids = tokenizer.encode(init_token or "\n", add_special_tokens=False)
    if not source_ids:
        raise ConfigError(
            f"{init_token or chr(10)!r} is no token of this tokenizer, and the new tokens are to start from its "
            "embedding; set latent_init_token to one that exists"
        )
    if len(tokenizer) > rows:
        base_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = [base_model.get_input_embeddings(), base_model.get_output_embeddings()]
    weights = list({id(table.weight): table.weight for table in tables if table is not None}.values())
    with _gathered(weights), torch.no_grad():
        for weight in weights:
            weight[list(special_ids)] = weight[source_ids[-1]].clone()
    logger.info("embeddings of %s start from that of %r", special_ids, init_token or "\n")


def _embedding_rows(base_model: PreTrainedModel) -> int:
    weight = base_model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _gathered(weights: list[Tensor]) -> Any:
    """Whole weights inside, for reading and writing, when ZeRO-3 has partitioned them."""
    import contextlib

    if not any(hasattr(weight, "ds_id") for weight in weights):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights, modifier_rank=0)


def _read_metadata(model: MultimodalCoconut, folder: Path) -> None:
    path = folder / METADATA_FILE
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text())
        model.prompt_template = PromptTemplate.from_dict(content["prompt_template"])
        model.stage_spec = StageSpec(**content["stage_spec"]) if content["stage_spec"] else None
        model.metadata = content["metadata"]
        latents = content.get("latents", {})  # not in checkpoints of older versions
        model.set_latent_feedback(latents.get("feedback", "hidden"), latents.get("embedding_norm"))
        model.set_latent_passes(latents.get("jacobi_iterations"))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); save the checkpoint again") from error


def _read_own_weights(model: MultimodalCoconut, folder: Path) -> None:
    """Weights that are no part of the transformers model: the projector's, and those of auxiliary losses."""
    path = folder / OWN_WEIGHTS_FILE
    if not path.is_file():
        return
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save the checkpoint again") from error
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(BASE_PREFIX)}
    if unfit := [name for name in found if name in wanted and found[name].shape != wanted[name].shape]:
        raise CheckpointError(f"{path} holds weights of other sizes than this model's: {', '.join(unfit)}")
    unused = sorted(found.keys() - wanted.keys())
    if unused:
        logger.warning("%s holds weights that this run has no use for: %s", path, ", ".join(unused))
    model.load_state_dict({name: tensor for name, tensor in found.items() if name in wanted}, strict=False)


def _hand_on_generation(model: MultimodalCoconut, folder: Path) -> None:
    """Let plain transformers think in latent space too, where one file that it can load suffices for it."""
    is_plain = model.loop.iterations is None and model.latent_feedback in ("hidden", "normed")
    if not is_plain or type(model.backbone) not in (Backbone, InternVLBackbone):
        return
    model.base_model.config.latent_token_id = model.latent_token_id
    model.base_model.config.latent_embedding_norm = model.embedding_norm
    target = folder / "custom_generate" / "generate.py"
    target.parent.mkdir(exist_ok=True)
    target.write_text(inspect.getsource(custom_generate))


def save_model(model: MultimodalCoconut, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
    """See `MultimodalCoconut.save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    _hand_on_generation(model, folder)
    whole = adapters.merged(model, model.state_dict() if state_dict is None else state_dict)
    weights = {name.removeprefix(BASE_PREFIX): w for name, w in whole.items() if name.startswith(BASE_PREFIX)}
    model.base_model.save_pretrained(folder, state_dict=weights)
    own = {name: w.contiguous() for name, w in whole.items() if not name.startswith(BASE_PREFIX)}
    if own:
        save_file(own, folder / OWN_WEIGHTS_FILE)
    template = model.prompt_template or PromptTemplate()
    content = {
        "latent_ids": list(model.latent_ids),
        "prompt_template": template.to_dict(),
        "stage_spec": dataclasses.asdict(model.stage_spec) if model.stage_spec else None,
        "latents": {
            "feedback": model.latent_feedback,
            "embedding_norm": model.embedding_norm,
            "jacobi_iterations": model.loop.iterations,
        },
        "metadata": model.metadata,
    }
    (folder / METADATA_FILE).write_text(json.dumps(content, indent=2) + "\n")
