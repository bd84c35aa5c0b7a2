"""What of a model is trained: whole parts, low-rank adapters (LoRA, arXiv 2106.09685), rows of the embedding table.

    freeze: [vision]    no gradient for the part
    lora_rank: 16       the text model stays as it is; peft's A and B beside its linear layers learn
    either, where it freezes the token embeddings: the rows of the three latent tokens learn all the same (`TokenRows`)

Saved folders hold merged weights, so that plain transformers loads them; checkpoints hold the parts apart.

Shapes: B rows, L columns, H hidden size, V vocabulary, S special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coconut.types import ConfigError
from coconut.utils.logging import get_logger

if TYPE_CHECKING:
    from coconut.model.backbones.base import Backbone
    from coconut.model.coconut import MultimodalCoconut

logger = get_logger(__name__)

ADAPTER = "default"  # peft's name for an adapter that has none
ROWS = "latent_token_rows"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters beside linear layers of the decoder."""

    rank: int
    alpha: float  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.0  # of the adapter's input
    targets: tuple[str, ...] | None = None  # layers' names, or their ends (q_proj, mlp.up_proj); None: all linear ones

    @classmethod
    def from_config(cls, config: Any) -> LoraSettings | None:
        """None where the configuration asks for no LoRA."""
        if config.lora_rank is None:
            return None
        alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
        targets = config.lora_target_modules
        return cls(config.lora_rank, alpha, config.lora_dropout, None if targets is None else tuple(targets))


def check_trained(backbone: Backbone, freeze: Sequence[str], lora: LoraSettings | None) -> None:
    """Refuse what this model cannot do; needs no weights (`load_outline`).

    Raises:
        ConfigError: a part that it has not, nothing left to train, adapters that match no layer, or peft is missing.
    """
    parts, family = backbone.parts, type(backbone.base_model).__name__
    if unknown := [name for name in freeze if name not in parts]:
        raise ConfigError(f"freeze names {', '.join(unknown)}: {family} has the parts {', '.join(parts)}")
    if lora is None:
        if set(freeze) == set(parts):
            raise ConfigError(
                f"freeze names every part of {family} ({', '.join(parts)}), so nothing is left to train; "
                "leave one out, or set lora_rank"
            )
        return
    try:
        import peft  # noqa: F401 - asked for before any weight is loaded
    except ImportError as error:
        raise ConfigError("lora_rank needs peft: pip install 'multimodal-coconut[lora]'") from error
    lora_layers(backbone, lora.targets)


def lora_layers(backbone: Backbone, targets: Sequence[str] | None) -> dict[str, nn.Module]:
    """The decoder's linear layers that get an adapter, by name.

    Raises:
        ConfigError: a target is the name of none.
    """
    linear = {n: m for n, m in backbone.decoder.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    if targets is None:
        return linear

    def matches(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    if unmatched := [target for target in targets if not any(matches(name, target) for name in linear)]:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        family = type(backbone.decoder).__name__
        raise ConfigError(
            f"lora_target_modules names {', '.join(unmatched)}, which no linear layer of {family} is called; "
            f"its layers are {known}"
        )
    return {name: layer for name, layer in linear.items() if any(matches(name, target) for target in targets)}


def choose_trained(model: MultimodalCoconut, freeze: Sequence[str], lora: LoraSettings | None, seed: int) -> None:
    """Freeze parts of a model and put adapters into it, before an engine takes it over.

    With LoRA the decoder, the token embeddings and the head are frozen, whatever `freeze` says.

    Args:
        seed: of the adapters' initial weights, the same on every rank; the global random state is left alone.

    Raises:
        ConfigError: see `check_trained`.
    """
    check_trained(model.backbone, freeze, lora)
    parts = model.backbone.parts
    frozen = {*freeze, *(("language", "embeddings") if lora is not None else ())}
    for name in frozen:
        for parameter in parts[name]:
            parameter.requires_grad_(False)
    if lora is not None:
        _add_lora(model.backbone, lora, seed)
    if "embeddings" in frozen:
        _train_token_rows(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if frozen:
        count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
        logger.info("%.4g parameters are trained; frozen: %s", count, ", ".join(sorted(frozen)))


def _add_lora(backbone: Backbone, lora: LoraSettings, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    layers = lora_layers(backbone, lora.targets)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # annotated as int, used as a factor
        lora_dropout=lora.dropout,
        target_modules=list(layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, backbone.decoder, ADAPTER)


# -- rows of a frozen embedding table --


class TokenRows:
    """Mixed into the class of a frozen embedding or head: adds a trained correction to the rows of a few tokens.

    New tokens start as copies of another. Were their rows frozen, the head could never tell them from it: three copies
    of the line break would keep it below a probability of 1/4. peft's `trainable_token_indices` reads the table outside
    of a module's call, where ZeRO-3 has it partitioned, and copies it whole in each one.
    """

    token_ids_S: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)  # type: ignore[misc]
        rows_SH: Tensor = getattr(self, ROWS)
        if isinstance(self, nn.Embedding):
            return out + (x[..., None] == self.token_ids_S).to(out.dtype) @ rows_SH
        # In place: the layer has just made these logits and needs them no more, and a copy of them is large.
        return out.index_add_(-1, self.token_ids_S, x @ rows_SH.T)


def _train_token_rows(model: MultimodalCoconut) -> None:
    embedding, head = model.base_model.get_input_embeddings(), model.backbone.head
    rows_SH: nn.Parameter | None = None
    for table in (embedding, head):
        weight: Any = table.weight
        if rows_SH is None or weight is not embedding.weight:
            width = getattr(weight, "ds_shape", weight.shape)[1]
            rows_SH = nn.Parameter(torch.zeros(len(model.latent_ids), width, dtype=weight.dtype, device=weight.device))
        table.__class__ = type(f"{type(table).__name__}WithTokenRows", (TokenRows, type(table)), {})
        table.register_parameter(ROWS, rows_SH)
        table.register_buffer("token_ids_S", torch.tensor(model.latent_ids, device=weight.device), persistent=False)


# -- saving --


def merged(model: MultimodalCoconut, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights under the names of a model without adapters, each sum rounded once.

    Args:
        state_dict: of `model`, gathered.
    """
    weights = {name: w for name, w in state_dict.items() if ".lora_" not in name and not name.endswith(f".{ROWS}")}
    weights = {name.replace(".base_layer.", "."): weight for name, weight in weights.items()}
    tables: dict[int, Tensor] = {}  # a head that is tied to the embedding stays so
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, TokenRows):
            weight = weights[key]
            if weight.data_ptr() not in tables:
                ids = torch.tensor(model.latent_ids, device=weight.device)
                tables[weight.data_ptr()] = weight.index_add(0, ids, state_dict[f"{name}.{ROWS}"].to(weight.dtype))
            weights[key] = tables[weight.data_ptr()]
        elif hasattr(module, "lora_A"):
            a, b = (state_dict[f"{name}.lora_{side}.{ADAPTER}.weight"].double() for side in "AB")
            change = (b @ a) * module.scaling[ADAPTER]
            change = change.T if module.fan_in_fan_out else change
            weights[key] = (weights[key].double() + change).to(weights[key].dtype)
    return weights
