"""Compile what DeepSpeed compiles at its first start on CPUs, before any training needs it.

    python launch/build_ops.py

Left to the first training run, two ranks race for it, and a run that is killed meanwhile leaves a lock file at which
every later one waits for ever. Compiles nothing on GPUs, nor when it is there already.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

STALE_AFTER_S = 300  # a build takes about one minute


def remove_stale_lock(folder: Path, stale_after_s: float = STALE_AFTER_S) -> bool:
    """Wait for a build in progress, until its lock file is too old to belong to one; returns whether it was removed."""
    lock = folder / "lock"
    said = False
    while lock.exists():
        if time.time() - lock.stat().st_mtime > stale_after_s:
            lock.unlink(missing_ok=True)
            return True
        if not said:
            print(f"waiting for the build that holds {lock} (at most {stale_after_s:.0f} s)", flush=True)
            said = True
        time.sleep(1)
    return False


def main() -> int:
    # ninja lies beside the interpreter, which need not be on the PATH
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return 0
    from deepspeed.comm.torch import build_shm_op
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with (root / "coconut_build.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)  # let go by the kernel when a process dies, unlike the builder's own
        for lock in root.glob("**/deepspeed_shm_comm/lock"):
            remove_stale_lock(lock.parent)
        build_shm_op()
    print(f"DeepSpeed's CPU communication is ready ({time.perf_counter() - begin:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
