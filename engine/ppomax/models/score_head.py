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


class Scale:
    """values = gain * x + shift of a head's output x: two numbers beside the weights, by which a critic's values change
    units (recipe/units.py)."""

    def __init__(self) -> None:
        self.gain, self.shift = 1.0, 0.0

    def of(self, x: Tensor) -> Tensor:
        """The values; x itself if they are the same."""
        return x if (self.gain, self.shift) == (1.0, 0.0) else self.gain * x + self.shift

    def move(self, old_mean: float, old_std: float, mean: float, std: float) -> None:
        """From values that mean `old_mean + old_std * v` to such that mean `mean + std * v`."""
        self.gain *= old_std / std
        self.shift = (old_std * self.shift + old_mean - mean) / std
