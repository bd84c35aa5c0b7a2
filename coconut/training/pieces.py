"""The training state of a DeepSpeed engine as pieces of named parameters, for any ZeRO stage and number of ranks.

    a parameter's fp32 weight, or a moment of its optimizer, flattened:
    |------- piece of rank 0 -------|------- piece of rank 1 -------|        written by 2 ranks
    |- rank 0 -|- rank 1 -|- rank 2 -|                                       read by 3

A rank writes what it holds into one safetensors file, with each piece's place in its parameter; a rank that reads takes
the overlaps with what it holds. So a checkpoint does not know ZeRO stages or ranks, and nothing is unpickled.
DeepSpeed's own files hold flat partitions of one layout; its universal ones need a second copy of the state on disk,
do not cross ZeRO stages, and are pickles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from coconut.types import CheckpointError, ConfigError
from coconut.utils.distributed import get_rank, get_world_size

WEIGHT = "weight"
FILE_NAME = "rank-{:05d}.safetensors"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # fp16's loss scaling

#: The optimizer's flat tensor, the piece's offset in it, its start in the parameter, its number of values.
Place = tuple[torch.Tensor, int, int, int]


@dataclass
class Piece:
    """What this rank holds of one parameter or buffer."""

    name: str
    start: int  # of the flattened parameter
    weight: torch.Tensor  # flat view into the engine's memory
    offset: int = 0  # of the piece in `flat`
    flat: torch.Tensor | None = None  # the optimizer's tensor that it is part of; None: not trained
    state: MutableMapping[str, Any] = field(default_factory=dict)  # of `flat`, in the optimizer
    writes: bool = True  # False where another rank writes the same values

    @property
    def numel(self) -> int:
        return self.weight.numel()

    def moments(self) -> dict[str, torch.Tensor]:
        """Flat views of the optimizer's tensors for this piece (exp_avg, exp_avg_sq)."""
        return {
            key: value.view(-1).narrow(0, self.offset, self.numel)
            for key, value in self.state.items()
            if self.flat is not None and _is_moment(key, value, self.flat)
        }

    def scalars(self) -> dict[str, float]:
        """The optimizer's numbers for this piece (step)."""
        return {
            key: float(value)
            for key, value in self.state.items()
            if isinstance(value, (int, float, torch.Tensor)) and not _is_moment(key, value, self.flat)
        }

    def set_scalar(self, key: str, number: float) -> None:
        old = self.state.get(key)
        if isinstance(old, torch.Tensor):
            old.fill_(number)
        else:  # torch's own optimizers keep the step as a tensor, DeepSpeed's as a number
            self.state[key] = torch.tensor(number) if old is None else type(old)(number)


def _is_moment(key: str, value: Any, flat: torch.Tensor | None) -> bool:
    return flat is not None and isinstance(value, torch.Tensor) and value.shape == flat.shape and key != "step"


# -- where an engine keeps them --


def pieces(engine: Any) -> Iterator[Piece]:
    """Every trained parameter, frozen parameter and buffer, as far as this rank holds it.

    Raises:
        ConfigError: optimizer states lie on NVMe, where they cannot be read in place.
    """
    optimizer, base = engine.optimizer, _innermost(engine.optimizer)
    is_main = get_rank() == 0
    copies = _places_without_zero(optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield _frozen(name, parameter, is_main)
            continue
        place: Place | None
        if hasattr(parameter, "ds_id"):  # ZeRO-3
            place = _place_zero3(optimizer, parameter)
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
            place = _place_zero12(optimizer, parameter)
        else:  # whole on every rank
            place = copies.get(id(parameter), (parameter, 0, 0, parameter.numel()))
        if place is not None and place[3] > 0:
            flat, offset, start, numel = place
            weight = flat.detach().view(-1).narrow(0, offset, numel)
            is_shared = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
            writes = is_shared or is_main
            # Asking a defaultdict for a missing state would make one.
            state = base.state[flat] if flat in base.state else base.state.setdefault(flat, {})
            yield Piece(name, start, weight, offset, flat, state, writes)
    for prefix, module in engine.module.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.numel():
                full_name = f"{prefix}.{name}" if prefix else name
                yield Piece(full_name, 0, buffer.detach().view(-1), writes=is_main)


def _place_zero3(optimizer: Any, parameter: Any) -> Place:
    group, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    if flat is None or flat.numel() == 0:
        raise ConfigError(
            "the DeepSpeed configuration keeps optimizer states on NVMe, which checkpoints here do not cover; "
            'set zero_optimization.offload_optimizer.device to "cpu" or "none"'
        )
    start = get_rank() * partition  # the last ranks hold padding beyond the parameter's end
    return flat, offset, start, max(0, min(partition, parameter.ds_numel - start))


def _place_zero12(optimizer: Any, parameter: Any) -> Place | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # other ranks hold all of it
        return None
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    flat = flats[mapping.param_group_index]
    return flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel


def _places_without_zero(optimizer: Any) -> dict[int, Place]:
    """Places in the fp32 copies that half precision without ZeRO keeps, by the parameter's identity."""
    places: dict[int, Place] = {}
    groups = getattr(optimizer, "fp16_groups", [])
    for group, copies in zip(groups, getattr(optimizer, "fp32_groups", []), strict=False):
        places |= {id(p): (copy, 0, 0, p.numel()) for p, copy in zip(group, copies, strict=True)}
    for group, flat in zip(groups, getattr(optimizer, "fp32_groups_flat", []), strict=False):
        offset = 0
        for parameter in group:
            places[id(parameter)] = (flat, offset, 0, parameter.numel())
            offset += parameter.numel()
    return places


def _frozen(name: str, parameter: Any, is_main: bool) -> Piece:
    if not hasattr(parameter, "ds_id"):
        return Piece(name, 0, parameter.detach().view(-1), writes=is_main)
    partition = parameter.ds_tensor.numel()
    start = get_rank() * partition
    numel = max(0, min(partition, parameter.ds_numel - start))
    return Piece(name, start, parameter.ds_tensor.detach().view(-1).narrow(0, 0, numel))


def _is_zero3(engine: Any) -> bool:
    return bool(engine.zero_optimization_partition_weights())


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


# -- writing --


def local_bytes(engine: Any) -> int:
    """Bytes that this rank's file will take, but for its header."""
    return sum(
        tensor.numel() * tensor.element_size()
        for piece in pieces(engine)
        if piece.writes
        for tensor in (piece.weight, *piece.moments().values())
    )


@dataclass(frozen=True)
class PiecesCopy:
    """This rank's pieces as they were when copied, in the memory of the host."""

    tensors: dict[str, torch.Tensor]
    places: dict[str, Any]

    def write(self, folder: Path) -> Path:
        """This rank's file in `folder`; each rank writes its own."""
        path = folder / FILE_NAME.format(get_rank())
        save_file(self.tensors, path, metadata={"places": json.dumps(self.places)})
        return path


def copy_pieces(engine: Any) -> PiecesCopy:
    """What this rank has to write, apart from the engine's memory: training may go on while it is written."""
    tensors, places = {}, {}
    for piece in pieces(engine):
        if not piece.writes or not piece.numel:
            continue
        for kind, tensor in {WEIGHT: piece.weight, **piece.moments()}.items():
            tensors[f"{kind}/{piece.name}"] = tensor.to("cpu", copy=True)  # safetensors refuses views of one memory
        places[piece.name] = {"start": piece.start, "numel": piece.numel, "scalars": piece.scalars()}
    return PiecesCopy(tensors, places)


def engine_numbers(engine: Any) -> dict[str, Any]:
    """Counters and loss scale: what an engine holds besides tensors. The same on every rank."""
    group_step = _innermost(engine.optimizer).param_groups[0].get("step")  # where DeepSpeed's fused Adam counts
    return {
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "scaler": {name: getattr(_scaler(engine), name) for name in SCALER if hasattr(_scaler(engine), name)},
        "group_step": int(group_step) if group_step is not None else None,
    }


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", engine.optimizer)


# -- reading --


class PieceReader:
    """The pieces in a checkpoint folder, by name.

    Raises:
        CheckpointError: a file is no safetensors file of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, list[tuple[Any, int, int]]] = {}  # name -> file, start, numel
        self.scalars: dict[str, dict[str, float]] = {}
        self.kinds: dict[str, set[str]] = {}
        for path in sorted(folder.glob(FILE_NAME.replace("{:05d}", "*"))):
            try:
                file = safe_open(path, framework="pt")
                places = json.loads((file.metadata() or {})["places"])
                for name, place in places.items():
                    self.found.setdefault(name, []).append((file, int(place["start"]), int(place["numel"])))
                    self.scalars.setdefault(name, {}).update(place["scalars"])
                for key in file.keys():  # noqa: SIM118 - a handle, no dictionary
                    kind, _, name = key.partition("/")
                    self.kinds.setdefault(name, set()).add(kind)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} is no checkpoint file: {error!r}") from error

    def fill(self, kind: str, name: str, start: int, out: torch.Tensor) -> None:
        """Copy the part of parameter `name` that begins at `start` into the flat tensor `out`."""
        end, missing = start + out.numel(), out.numel()
        for file, begin, numel in self.found.get(name, []):
            low, high = max(start, begin), min(end, begin + numel)
            if low < high:
                part = file.get_slice(f"{kind}/{name}")[low - begin : high - begin]
                out[low - start : high - start].copy_(part)
                missing -= high - low
        if missing:
            raise CheckpointError(
                f"{self.folder} holds {kind} of {name} with {missing} of {out.numel()} values missing; "
                "it was written for another model"
            )


def read_pieces(engine: Any, folder: Path, numbers: dict[str, Any]) -> None:
    """Put weights, optimizer states and counters back, whoever wrote them; every rank must call it.

    Raises:
        CheckpointError: the files do not fit this model.
    """
    optimizer, reader = engine.optimizer, PieceReader(folder)
    if _is_zero3(engine):
        optimizer._partition_all_parameters()
    with torch.no_grad():
        for piece in pieces(engine):
            reader.fill(WEIGHT, piece.name, piece.start, piece.weight)
            if piece.flat is not None:
                _read_optimizer(reader, piece)
        _refresh_working_weights(engine)
    for name in COUNTERS:
        setattr(engine, name, numbers["counters"][name])
    # Of this engine's accumulation, not of the one that saved: DeepSpeed takes a step where this divides it.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    for name, value in numbers["scaler"].items():
        setattr(_scaler(engine), name, value)
    for group in _innermost(optimizer).param_groups:
        if numbers["group_step"] is not None and "step" in group:
            group["step"] = numbers["group_step"]


def _read_optimizer(reader: PieceReader, piece: Piece) -> None:
    assert piece.flat is not None
    kinds = reader.kinds.get(piece.name, set()) - {WEIGHT}
    for kind in sorted(kinds - set(piece.state)):
        piece.state[kind] = torch.zeros_like(piece.flat)
    for kind, moment in piece.moments().items():
        if kind in kinds:
            reader.fill(kind, piece.name, piece.start, moment)
        else:
            moment.zero_()
    for key, number in reader.scalars.get(piece.name, {}).items():
        piece.set_scalar(key, number)


def _refresh_working_weights(engine: Any) -> None:
    """Carry the fp32 weights over to those that the model computes with, as a step does at its end."""
    optimizer = engine.optimizer
    if _is_zero3(engine):
        for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            working = optimizer.fp16_partitioned_groups_flat[group]
            working.data.copy_(flat.data)
            parameters = optimizer.fp16_partitioned_groups[group]
            for parameter, values in zip(parameters, optimizer.unflatten(working, parameters), strict=True):
                parameter.data = values.data
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        copies = _places_without_zero(optimizer)
        for parameter in engine.module.parameters():
            if id(parameter) in copies:
                flat, offset, _, numel = copies[id(parameter)]
                parameter.data.copy_(flat.detach().view(-1).narrow(0, offset, numel).view_as(parameter))


def world_note(folder: Path) -> str:
    """``2 ranks``: who wrote the pieces in a folder, where that differs from this run; else empty."""
    written = len(list(folder.glob(FILE_NAME.replace("{:05d}", "*"))))
    return f", written by {written} rank(s), read by {get_world_size()}" if written != get_world_size() else ""
