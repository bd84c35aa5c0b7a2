"""What the doctor looks at, one function a line of its report.

A check returns what it found, raises `Concern` where a run would work but badly or only in part, and `Fault` where it
would not; both say what is wrong and how to mend it. Nothing is imported that a broken installation may lack: torch,
DeepSpeed and the rest only inside checks that are not part of a quick examination.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LEAST_PYTHON = (3, 11)
IMPORTED = ("torch", "torchvision", "transformers", "deepspeed", "webdataset")  # looked at by name, and imported
#: Versions before which a library is known to compute wrongly here, and what goes wrong.
WRONG_BEFORE = {
    "deepspeed": ("0.19.4", "with frozen parts and gradient checkpointing it trains wrongly or stops (DeepSpeed#8148)"),
}
SHM = Path("/dev/shm")  # noqa: S108 - shared memory, not a temporary file
LEAST_SHM_MB = 64  # what containers get by default; loader processes pass batches through it
SHM_A_RANK_MB = 1000  # recommended: 0.3 GB for DeepSpeed's collectives on a CPU, the rest for loader processes
BUILD_S = 600  # longer than any build of DeepSpeed's takes
LEAST_FILES, GOOD_FILES = 256, 1024  # open files a process


class Fault(Exception):
    """Something that keeps a run from working, and how to mend it."""


class Concern(Exception):
    """Something that a run can do without, at a price, and how to mend it."""


# -- software --


def check_python() -> str:
    if sys.version_info < LEAST_PYTHON:
        raise Fault(f"{sys.version.split()[0]} at {sys.executable} is too old; 3.11 is needed: run launch/setup.sh")
    return f"{sys.version.split()[0]} at {sys.executable}"


def check_package(name: str, least: str, do_import: bool) -> str:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise Fault(f"is not installed for {sys.executable}; run launch/setup.sh, or set COCONUT_PYTHON") from None
    if numbers(found) < numbers(least):
        before, reason = WRONG_BEFORE.get(name, ("0", ""))
        why = f" ({reason})" if numbers(found) < numbers(before) else ""
        raise Fault(f"{found} is older than {least}{why}; run launch/setup.sh, or pip install '{name}>={least}'")
    if do_import:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever an installation that is broken may raise
            raise Fault(f"{found} cannot be imported ({type(error).__name__}: {error}); install it anew") from error
    return found


def check_others() -> str:
    """The dependencies that have no line of their own."""
    missing, old = [], []
    for name, least in requirements("dependencies").items():
        if name in IMPORTED:
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name}>={least}")
            continue
        if numbers(found) < numbers(least):
            old.append(f"{name} {found} (at least {least})")
    faults = ([f"missing: {', '.join(missing)}"] if missing else []) + ([f"too old: {', '.join(old)}"] if old else [])
    if faults:
        raise Fault(f"{'; '.join(faults)}; run launch/setup.sh")
    return "as pyproject.toml asks"


def check_extras() -> str:
    """What only some settings need: wandb, tensorboard, peft, pyarrow."""
    found: list[str] = []
    absent: list[str] = []
    old: list[str] = []
    for name, least in requirements("optional").items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        (found if numbers(version) >= numbers(least) else old).append(f"{name} {version}")
    text = (", ".join(found) or "none") + (f"; not installed: {', '.join(absent)}" if absent else "")
    if old:
        raise Concern(f"{text}; too old: {', '.join(old)}; pip install --upgrade {' '.join(o.split()[0] for o in old)}")
    return text


def check_torch_pair() -> str:
    """torch and torchvision must come from the same index: one's CPU build does not import beside the other's CUDA."""
    kinds = {}
    for name in ("torch", "torchvision"):
        try:
            kinds[name] = importlib.metadata.version(name).partition("+")[2] or "default"
        except importlib.metadata.PackageNotFoundError:
            return "not both installed"
    if len(set(kinds.values())) > 1 and "cpu" in kinds.values():
        both = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise Fault(f"{both}: builds of two indexes do not work together; install both from one")
    return kinds["torch"]


def requirements(group: str) -> dict[str, str]:
    """Oldest versions that pyproject.toml admits, read without tomllib: an old Python is a fault to be named.

    Args:
        group: "dependencies", or "optional" for those of the extras that users may choose.
    """
    text = (ROOT / "pyproject.toml").read_text()
    if group == "dependencies":
        part = text[text.index("\ndependencies = [") :].partition("\n]")[0]
    else:
        part = text[text.index("[project.optional-dependencies]") :].partition("\ndev = [")[0]
    return dict(re.findall(r'"([\w.-]+)>=([\d.]+)"', part))


def numbers(version: str) -> list[int]:
    """[2, 14, 0] for 2.14.0+cu130."""
    parts = version.split("+")[0].split(".")
    return [int(part) for part in parts if part.isdigit()]


def check_compilers() -> str:
    """A C++ compiler and ninja, by which DeepSpeed compiles its parts at their first use."""
    scripts = Path(sys.executable).parent
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    ninja = shutil.which("ninja", path=f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    missing = [name for name, path in (("g++", compiler), ("ninja", ninja)) if path is None]
    if missing:
        fix = f"{' and '.join(missing)} not found on PATH; apt-get install g++, pip install ninja"
        if is_cpu_only() and not has_build():
            raise Fault(f"{fix}: DeepSpeed compiles its CPU collectives with them at the first start")
        raise Concern(f"{fix}: what DeepSpeed has not compiled yet (offload's CPU Adam) cannot be used")
    done = subprocess.run([str(compiler), "-dumpversion"], capture_output=True, text=True, timeout=60, check=False)
    return f"{compiler} {done.stdout.strip()}, {ninja}"


def check_cuda_compiler() -> str:
    """nvcc, of torch's CUDA version: for DeepSpeed's CUDA kernels, which no configuration of ours needs."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no GPU, none needed"
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        raise Concern(
            f"no nvcc on PATH or in {home}: DeepSpeed's fused optimizers cannot be compiled; torch's are used"
        )
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        version = f"{found[1]}.{found[2]}" if found else "an unknown version"
        raise Concern(
            f"{nvcc} is {version}, torch was built with {torch.version.cuda}: DeepSpeed refuses to compile; set "
            f"CUDA_HOME to a CUDA {torch.version.cuda.split('.')[0]}"
        )
    return f"{nvcc} {found[1]}.{found[2]}, torch {torch.version.cuda}"


# -- machine --


def check_folder(folder: Path, least_gb: float) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Fault(f"{folder} cannot be written to ({error}); is the shared disk mounted here?") from error
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < least_gb:
        raise Fault(
            f"{folder} has {free_gb:.1f} GB left, {least_gb:g} are needed; make room or choose another save_path"
        )
    return f"{folder}, {free_gb:.0f} GB free"


def check_shared_memory(ranks: int) -> str:
    if not SHM.is_dir():
        raise Fault(f"{SHM} is missing; mount it (containers: --ipc=host, or --shm-size)")
    usage = shutil.disk_usage(SHM)
    size, free = usage.total / 1e6, usage.free / 1e6
    good = SHM_A_RANK_MB * ranks
    enlarge = f"containers: --ipc=host or --shm-size={good / 1000:.0f}g; else mount -o remount,size=... {SHM}"
    if size < LEAST_SHM_MB:
        raise Fault(f"{SHM} is {size:.0f} MB, {LEAST_SHM_MB} are needed and {good} recommended; {enlarge}")
    if free < LEAST_SHM_MB:
        raise Fault(f"{SHM} has {free:.0f} MB left, {LEAST_SHM_MB} are needed; remove what dead jobs left there")
    if free < good:
        raise Concern(f"{free:.0f} MB free, {good} are recommended for {ranks} rank(s); {enlarge}, or num_workers=0")
    return f"{free:.0f} of {size:.0f} MB free"


def check_processors(ranks: int) -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable < ranks:
        raise Concern(f"{usable} for {ranks} ranks, which will share them: slow; ask for more, or start fewer ranks")
    return f"{usable} for {ranks} rank(s)"


def check_open_files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return "no limit"
    text = f"{soft} a process (ulimit -n), at most {'any number' if hard == resource.RLIM_INFINITY else hard}"
    fix = f"each shard and loader process takes some; ulimit -n {GOOD_FILES}, or limits.conf"
    if soft < LEAST_FILES:
        raise Fault(f"{text}; {fix}")
    if soft < GOOD_FILES:
        raise Concern(f"{text}; {fix}")
    return text


def check_gpus(wanted: int, ranks: int) -> str:
    if wanted == 0 and shutil.which("nvidia-smi") is None:
        return "none asked for"
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Fault(f"{wanted} GPU(s) were given to the job, and nvidia-smi does not answer ({error})") from error
    found = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    if done.returncode or len(found) < wanted:
        raise Fault(f"{len(found)} of {wanted} GPU(s) answer nvidia-smi {done.stderr.strip()}; drain this node")
    if found and len(found) < ranks:
        raise Fault(f"{len(found)} GPU(s) for {ranks} ranks; ask for more, or set COCONUT_RANKS_PER_NODE={len(found)}")
    return f"{len(found)} visible" + (f", {found[0].split(' (UUID')[0]}" if found else "")


def check_accelerator() -> str:
    """What torch itself sees."""
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        text = f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise Concern(f"{text}, without bf16: use fp16=true or neither")
        return text
    if not is_cpu_only():
        raise Fault(
            "nvidia-smi is here, but torch finds no GPU: a torch built for CPUs, a driver too old for its CUDA "
            f"({torch.version.cuda}), or CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
        )
    return f"CPU, {torch.get_num_threads()} threads"


def check_backends() -> str:
    """The libraries by which ranks speak to each other."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        raise Fault("torch was built without gloo; install torch from its usual index")
    text = "gloo"
    if torch.cuda.is_available():
        if not dist.is_nccl_available():
            raise Fault("there are GPUs, and torch was built without NCCL; install torch from its usual index")
        text += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    return text


# -- DeepSpeed --


def is_cpu_only() -> bool:
    return shutil.which("nvidia-smi") is None


def build_folder() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or ROOT / ".cache" / "torch_extensions")


def has_build() -> bool:
    """Whether DeepSpeed's CPU collectives were compiled."""
    return any(build_folder().glob("*/*.so"))


def check_builds() -> str:
    folder = build_folder()
    if is_cpu_only() and not has_build():
        raise Fault(f"{folder} holds no build of DeepSpeed's CPU collectives; run launch/setup.sh on one machine first")
    # Newer versions of torch leave the file of a finished build's lock too, and wait for no dead process.
    killed = [
        path.parent
        for path in folder.glob("*/lock")
        if not any(path.parent.glob("*.so")) and time.time() - path.stat().st_mtime > BUILD_S
    ]
    if killed:
        raise Concern(f"the build in {killed[0]} was killed, and older versions of torch wait for it; remove its lock")
    return str(folder)


def check_ops() -> str:
    """Whether DeepSpeed's own operators are there, or could be compiled."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import CPUAdamBuilder

    if installed_ops.get("cpu_adam") or any(build_folder().glob("cpu_adam/*.so")):
        return "CPU Adam is compiled"
    if not CPUAdamBuilder().is_compatible(verbose=False):
        raise Concern("CPU Adam, which offload (zero3_offload.json) needs, cannot be compiled here; all else works")
    return "CPU Adam is compiled at its first use"


def check_two_ranks(timeout_s: float) -> str:
    """A process group of two on this machine, made and used as training does."""
    import torch

    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    backend = "NCCL"
    if torch.cuda.device_count() < 2:
        environment["CUDA_VISIBLE_DEVICES"], backend = "", "gloo"
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), "--as-rank"]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        ranks = [
            subprocess.Popen(
                command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stdout=output, stderr=subprocess.STDOUT
            )
            for rank in ("0", "1")
        ]
        try:
            codes = [rank.wait(max(0.1, began + timeout_s - time.monotonic())) for rank in ranks]
        except subprocess.TimeoutExpired:
            codes = []
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        output.seek(0)
        said = output.read()
    names = "NCCL_SOCKET_IFNAME" if backend == "NCCL" else "GLOO_SOCKET_IFNAME"
    last = " ".join(said.strip().splitlines()[-1:])
    if not codes:
        fix = f"a firewall on the loopback device, a wrong {names}, a build in {build_folder()} that hangs, or"
        fix += " a machine so busy that two Python processes need longer to start (then a larger --timeout helps)"
        raise Fault(f"no answer after {timeout_s:.0f} s by {backend}; {fix}. Last words: {last}")
    if codes != [0, 0] or said.count("the sum is 3.0") != 2:
        raise Fault(f"the ranks ended with {codes} by {backend}; check {names} and the lines above. Last words: {last}")
    return f"{backend}, {time.monotonic() - began:.0f} s"


def be_a_rank() -> None:
    """One of the two: what `check_two_ranks` starts."""
    sys.path.insert(0, str(ROOT))
    from coconut.utils.distributed import all_reduce_sum, get_rank, init_distributed_training, shutdown_distributed

    init_distributed_training()
    print(f"the sum is {all_reduce_sum([get_rank() + 1.0])[0]}", flush=True)
    shutdown_distributed()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
