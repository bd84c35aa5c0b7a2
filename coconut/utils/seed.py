"""One seed for every random number generator of a process."""

from __future__ import annotations

import random


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy, PyTorch and, where there is one, every CUDA device.

    All ranks get the same seed: they must draw the same initial weights. What has to differ between samples is drawn
    from a hash of (seed, epoch, key) instead, never from a rank's generator.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA devices included
