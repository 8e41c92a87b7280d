"""The interval of a share."""

from __future__ import annotations

import math


def wilson(rate: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share `rate` of `n` trials (Wilson 1927)."""
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
