"""What DeepSpeed itself would refuse or overlook in its configuration, said before any weight is loaded.

DeepSpeed ignores a top-level name that it does not know: with ``zero_optimisation`` a run is ZeRO stage 0, without a
word. So its own reader is run on the dictionary, and what it asked for are the names that there are: no list of ours
that ages. DeepSpeed is imported inside the functions, since ``--help`` and most configurations need none of it.
"""

from __future__ import annotations

import copy
from collections.abc import KeysView
from typing import Any, cast

from pydantic import ValidationError

from coconut.config.faults import nearest_choice

_SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "DeepSpeedMonitorConfig": "",  # of the top level
}
_NOT_TORCHS = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")  # what DeepSpeed takes out of optimizer.params
_KINDS = {bool: "true or false", float: "a number", str: "text", dict: "a JSON object"}


def deepspeed_faults(resolved: dict[str, Any]) -> list[str]:
    """Unknown names, and values that DeepSpeed does not take (in sections that it checks: those of the first bad one).

    Args:
        resolved: a DeepSpeed configuration without "auto", whose sections are dictionaries.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    faults = _optimizer_faults(resolved["optimizer"])
    # DeepSpeed would hold this size against the number of ranks of this very process.
    asked = _Asked({name: copy.deepcopy(value) for name, value in resolved.items() if name != "train_batch_size"})
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        return faults + [_section_fault(error.title, dict(found)) for found in error.errors(include_url=False)]
    except Exception as error:  # assertions, ValueError, TypeError, its own: whatever its reader raises is the file's
        return [*faults, f"DeepSpeed refuses it: {error}"]
    for name, value in asked.items():
        if name not in asked.defaults:
            hint = nearest_choice(name, asked.defaults) or f"; it knows {', '.join(sorted(asked.defaults))}"
            faults.append(f"{name} is no name that DeepSpeed knows{hint}")
        elif not _fits(value, asked.defaults[name]):
            faults.append(f"{name} is {value!r}; it has to be {_KINDS[type(asked.defaults[name])]}")
    return faults


class _Asked(dict[str, Any]):
    """A dictionary that notes the names it was asked for, and the defaults that were given with them."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.defaults: dict[str, Any] = {}

    def __contains__(self, name: object) -> bool:
        self.defaults.setdefault(str(name), None)
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.defaults[name] = default
        return super().get(name, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return cast(KeysView[str], self)  # asked as `name in tree.keys()`

    def __copy__(self) -> _Asked:
        return self  # DeepSpeed reads a copy


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of its default's kind, where that tells one."""
    kind = type(default)
    if kind not in _KINDS:
        return True
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _section_fault(title: str, found: dict[str, Any]) -> str:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    key = ".".join([_SECTIONS.get(title, title), *map(str, found["loc"])]).lstrip(".")
    if found["type"] == "extra_forbidden":
        near = ""
        if title == "DeepSpeedZeroConfig" and len(found["loc"]) == 1:
            near = nearest_choice(found["loc"][0], DeepSpeedZeroConfig.model_fields)
        return f"{key} is no name that DeepSpeed knows{near}"
    return f"{key} is {found['input']!r}; DeepSpeed says: {found['msg']}"


def _optimizer_faults(optimizer: dict[str, Any]) -> list[str]:
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    name, params = optimizer.get("type"), dict(optimizer["params"])
    torch_s = getattr(torch.optim, name, None) if isinstance(name, str) else None
    if isinstance(name, str) and name.lower() in DEEPSPEED_OPTIMIZERS:
        is_torch_adam = name.lower() in ("adam", "adamw") and params.get("torch_adam")
        torch_s = torch.optim.AdamW if is_torch_adam else None  # DeepSpeed's own would have to be compiled first
    elif not (isinstance(torch_s, type) and issubclass(torch_s, torch.optim.Optimizer)):
        known = ", ".join(sorted(DEEPSPEED_OPTIMIZERS))
        fix = f"choose AdamW, another that DeepSpeed knows ({known}), or one of torch.optim"
        return [f"optimizer.type is {name!r}; {fix}"]
    if torch_s is not None:
        own = {key: value for key, value in params.items() if key not in _NOT_TORCHS}
        try:
            torch_s([torch.nn.Parameter(torch.zeros(1))], **own)
        except (TypeError, ValueError) as error:
            return [f"optimizer.params cannot be given to torch's {torch_s.__name__}: {error}"]
    return []
