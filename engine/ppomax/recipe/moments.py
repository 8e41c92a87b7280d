"""Running mean and standard deviation of all scores, which reward standardising divides by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

LEAST_STD = 1e-6
"""Below this the scores are taken as equal, and nothing is divided."""


@dataclass(frozen=True)
class RunningMoments:
    """Mean and standard deviation of all scores so far, batch by batch (Chan, Golub, LeVeque 1979), in float64.

    Any split of the same scores gives the same moments to rounding. Starts empty, never forgets."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def with_scores(self, scores: Tensor) -> RunningMoments:
        """These moments with one batch more: (n,) scores of all ranks."""
        x = scores.double()
        if not len(x):
            return self
        mean = float(x.mean())
        squares = float(((x - mean) ** 2).sum())
        count, shift = self.count + len(x), mean - self.mean
        return RunningMoments(
            count,
            self.mean + shift * len(x) / count,
            self.squares + (squares + shift**2 * self.count * len(x) / count),
        )

    @property
    def std(self) -> float:
        """Sample standard deviation; 1 while there are fewer than two scores or they are all equal."""
        std = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return std if std > LEAST_STD else 1.0
