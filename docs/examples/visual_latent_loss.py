"""An auxiliary loss in one short file: each thought is drawn to the picture's features that it resembles most.

    deepspeed launch/train.py --deepspeed ds_configs/zero3.json \
        auxiliary_losses='{"docs.examples.visual_latent_loss:visual_latent_loss": 0.1}'

In the spirit of work that grounds latent reasoning in the image; a starting point for one's own (CODI's distillation or
SIM-CoT's step decoder fit the same place), not a method with published results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coconut.model.auxiliary import ThoughtContext


def visual_latent_loss(context: ThoughtContext) -> Tensor:
    """Sum over the batch's thoughts of 1 - (largest cosine with a visual feature of the batch's tiles)."""
    thoughts_NH = context.thoughts_BKH[context.is_thought_BK]
    if context.visual_features_PTH is None or context.visual_features_PTH.numel() == 0:
        return thoughts_NH.sum() * 0
    features_MH = context.visual_features_PTH.flatten(0, 1)
    cosines_NM = torch.cosine_similarity(thoughts_NH[:, None], features_MH[None].detach(), dim=-1)
    nearest_N: Tensor = cosines_NM.amax(dim=1)
    return (1 - nearest_N).sum()
