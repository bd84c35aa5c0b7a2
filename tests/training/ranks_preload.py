"""What the ranks of `tests/training/ranks.py` import before they are forked."""

import deepspeed  # noqa: F401
import torch
import transformers  # noqa: F401

import coconut.training  # noqa: F401
import launch.train  # noqa: F401
from coconut.model import MultimodalCoconut  # noqa: F401

torch.set_num_threads(1)
