"""A new score head, for every model that gets one."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def draw_score_head(weight: Tensor, seed: int) -> None:
    """Fill a head's (1, D) weight with draws from N(0, (1/(D+1))^2), which start values near zero; `seed` fixes them,
    on every device and however the model is sharded."""
    generator = torch.Generator().manual_seed(seed)
    weight.copy_(torch.randn(weight.shape, generator=generator) / (weight.shape[-1] + 1))
