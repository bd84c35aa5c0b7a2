"""What the device of this rank can do, and how much of its memory is in use."""

from __future__ import annotations

import os
from pathlib import Path

import torch

#: Dense bf16 peak in TFLOPS, from the makers' data sheets; the first name that the device's contains counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A40": 150.0,
    "L4": 121.0,
    "MI300X": 1307.0,
    "MI250X": 383.0,
}


def device_name() -> str | None:
    """The accelerator's name; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_flops(peak_tflops: float | None, name: str | None) -> float | None:
    """Operations a second that one device can do at most.

    Args:
        peak_tflops: what the configuration says; wins over the table.
        name: of the accelerator; None on a CPU.

    Returns:
        None where neither says anything.
    """
    if peak_tflops is None and name is not None:
        words = name.replace("-", " ").split()
        # By whole words: an L40 is no L4, and an RTX A4000 no A40.
        peak_tflops = next((peak for key, peak in PEAK_TFLOPS.items() if set(key.split()) <= set(words)), None)
    return None if peak_tflops is None else peak_tflops * 1e12


def take_memory_peak() -> int:
    """Bytes: the most that was allocated on the accelerator since the last call; on a CPU, what the process holds."""
    if torch.cuda.is_available():
        peak = int(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return peak
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
