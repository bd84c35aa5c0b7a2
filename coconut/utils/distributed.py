"""The process group, and collectives that are the identity without one.

    launcher's environment -> init_distributed_training() -> all_reduce_sum(...) ... -> shutdown_distributed()

Torch and DeepSpeed are imported inside the functions, so that importing this module stays light.
"""

from __future__ import annotations

import atexit
import os
import socket
import sysconfig
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from coconut.types import CoconutError, ConfigError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

#: What a launcher (deepspeed, torchrun, srun + torchrun) sets for each rank.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

#: Gloo's threads drop the tensors of the last collectives after these have ended, for which they need Python's lock. A
#: thread that still waits for it when the interpreter shuts down aborts the process ("terminate called without an
#: active exception"), and a launcher takes a run that ended well for a failed one.
GLOO_RELEASES_S = 0.5


def collective_timeout_s(hang_timeout_s: float | None) -> float:
    """How long a collective may wait in a run with that ``hang_timeout_s``: longer, so the watchdog speaks first."""
    return 7 * 24 * 3600.0 if hang_timeout_s is None else max(2 * hang_timeout_s, 1800.0)


def init_distributed_training(force: bool = False, timeout_s: float = 1800.0) -> None:
    """Joins the process group that the launcher's environment describes: gloo on CPUs, NCCL on GPUs.

    Safe to call again. Without a launcher this process stays alone, without a process group.

    Args:
        force: make a group of one where there is no launcher (DeepSpeed's engine needs one).
        timeout_s: seconds until a collective that some rank does not join is an error.

    Raises:
        ConfigError: the environment is incomplete, or names a GPU that is not there.
    """
    if _has_group():
        return
    present = [name for name in LAUNCHER_VARIABLES if os.environ.get(name)]
    if not {"RANK", "WORLD_SIZE"} & set(present):
        if not force:
            return
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    elif missing := [name for name in LAUNCHER_VARIABLES if name not in present]:
        raise ConfigError(
            f"the environment sets {', '.join(present)} but not {', '.join(missing)}: "
            "start with deepspeed or torchrun, which set all of them, or unset them to run a single process"
        )
    import torch

    use_gpu = torch.cuda.is_available()
    if use_gpu:
        if get_local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK={get_local_rank()}, but this machine shows {torch.cuda.device_count()} GPUs: "
                "start one rank a GPU"
            )
        torch.cuda.set_device(get_local_rank())
    prepare_native_builds()
    import deepspeed

    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if use_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise ConfigError(
            f"port {port} is taken, by another run on this machine perhaps: give deepspeed, or torchrun, another one "
            f"with --master_port {int(port) + 1}"
        ) from error
    if not use_gpu:
        _forget_shared_memory()
        atexit.register(time.sleep, GLOO_RELEASES_S)


def prepare_native_builds() -> None:
    """Fixes where and with what DeepSpeed compiles at its first start, so that it compiles once.

    Builds go into the project's .cache, unless TORCH_EXTENSIONS_DIR is set. The ninja of this Python environment comes
    before the system's: each takes the other's build for outdated, and would compile anew at every change between them.
    """
    scripts, path = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = f"{scripts}{os.pathsep}{path}"
    project = Path(__file__).resolve().parents[2]
    if (project / "pyproject.toml").is_file():  # else installed without its project: torch's own default
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(project / ".cache" / "torch_extensions"))


def shutdown_distributed() -> None:
    """Leaves the process group, so that another may be joined; without one, does nothing."""
    if _has_group():
        import deepspeed

        deepspeed.comm.destroy_process_group()  # torch's own would leave the dead groups in DeepSpeed's memory


def get_rank() -> int:
    """This process's number among all; 0 when alone."""
    if _has_group():
        import torch.distributed as dist

        return dist.get_rank()
    return int(os.environ.get("RANK") or 0)


def get_local_rank() -> int:
    """This process's number on its machine; 0 when alone."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def get_world_size() -> int:
    """The number of processes that train together; 1 when alone."""
    if _has_group():
        import torch.distributed as dist

        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return get_rank() == 0


def get_device() -> torch.device:
    """The device this rank computes on."""
    import torch

    return torch.device("cuda", get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Waits until every rank is here."""
    if _has_group():
        import torch.distributed as dist

        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[get_local_rank()])
        else:
            dist.barrier()


def all_reduce_sum(values: list[float]) -> list[float]:
    """The sums over all ranks, added in float64; every rank must pass a list of the same length."""
    return _all_reduce(values, "SUM")


def all_reduce_max(values: list[float]) -> list[float]:
    """The maxima over all ranks; every rank must pass a list of the same length."""
    return _all_reduce(values, "MAX")


def all_gather_object(obj: T) -> list[T]:
    """Every rank's object, in the order of ranks, on every rank."""
    if not _has_group():
        return [obj]
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone. NCCL has types for that, gloo a plain RuntimeError."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def on_main_first(action: Callable[[], T]) -> T:
    """The main process's result of `action`, on every rank; its CoconutError is raised on every rank.

    For what one process has to do or decide for all: files are seen late on shared disks, and not at all on others.
    """
    result: tuple[T | None, CoconutError | None] = (None, None)
    if is_main_process():
        try:
            result = (action(), None)
        except CoconutError as error:
            result = (None, error)
    value, fault = all_gather_object(result)[0]
    if fault is not None:
        raise fault
    return value  # type: ignore[return-value]


def _all_reduce(values: list[float], operation: str) -> list[float]:
    if not _has_group():
        return [float(value) for value in values]
    import torch
    import torch.distributed as dist

    device = get_device() if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation))
    reduced: list[float] = tensor.tolist()
    return reduced


def _has_group() -> bool:
    # A process that has not imported torch cannot have joined a group: do not pay for the import to find out.
    import sys

    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _forget_shared_memory() -> None:
    # DeepSpeed's CPU collectives map 0.3 GB of /dev/shm a rank, and leave it there for good. Without its name it goes
    # with the last process that has it mapped, however that one ends, and no later run of this port finds it.
    barrier()  # every rank has mapped the others'
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)  # noqa: S108


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
