"""One unit for rewards and values. Scores reach PPO standardised by running moments, while a critic that starts as a
reward model gives raw scores: its values are moved into the units of the shaped score before the first advantages are
taken, and with the moments whenever those move, so that what it has learnt keeps its meaning (PopArt, arXiv
1602.07714).

The critic's weights are not touched: `gain` and `shift`, two numbers outside of them, do it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ppomax.config import RewardConfig
from ppomax.recipe.moments import RunningMoments


class Units(NamedTuple):
    """A raw score is `mean + std * x` for a value x in these units."""

    mean: float = 0.0
    std: float = 1.0


RAW = Units()


def units_of(moments: RunningMoments, config: RewardConfig) -> Units:
    """Of a score that `shape_scores` made with these moments, clip and penalty aside."""
    if config.standardize == "norm":
        return Units(moments.mean, moments.std)
    return RAW if config.standardize == "none" else Units(0.0, moments.std)


def moved(values: Tensor, old: Units, new: Units) -> Tensor:
    """Values in `old` units, in `new` ones; the same tensor if those are equal."""
    if old == new:
        return values
    return (old.std / new.std) * values + (old.mean - new.mean) / new.std
