"""The random stream of each sequence: a function of the run's seed and the sequence's number, so its draws depend
neither on batch, slot or rank, and no generator has a state to save."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASK = (1 << 64) - 1


def stream_seeds(seed: int, uids: Sequence[int]) -> Tensor:
    """(B,) int64 keys of the sequences' random streams: SplitMix64 of (seed, uid), so that near uids share nothing."""
    return torch.tensor([_signed(_mix(_mix(seed) ^ _mix(uid * 2 + 1))) for uid in uids], dtype=torch.int64)


def _mix(x: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014) on 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
