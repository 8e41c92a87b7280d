"""Tokens from logits with one random stream a sequence.

u(seed, uid, t) is a hash, not a state: a sequence's tokens depend on its own logits and its uid alone, whatever batch,
slot or rank it is decoded in, and there is no generator to save. The token is the inverse of the cumulative distribution at
u, summed in float64 since float32 sums lose the tail of a large vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


GOLDEN, MIX_1, MIX_2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014); int64 products wrap."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def uniforms(seed: int, uids: Tensor, position: int) -> Tensor:
    """(B,) float64 in [0, 1): one number for each (seed, uid, position). uids: (B,) int64."""
    start = _mix(torch.full_like(uids, _signed(seed & (1 << 64) - 1)) + GOLDEN)
    stream = _mix(start ^ _mix(uids * GOLDEN + MIX_2))
    return _shift(_mix(stream + _signed(((position + 1) * 0x9E3779B97F4A7C15) & (1 << 64) - 1)), 11).double() * 2.0**-53


def sample(logits: Tensor, u: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """logits (B, V), u (B,) -> token (B,) int64 and its logprob (B,) fp32 under the distribution sampled from.

    top_k first, then top_p: the smallest set of likeliest tokens whose mass reaches top_p. temperature 0 takes the
    likeliest token, with its logprob at temperature 1."""
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0]
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    logprobs = torch.log_softmax(logits, -1)
    mass = logprobs.double().exp().cumsum(-1)
    token = torch.searchsorted(mass, (u * mass[:, -1])[:, None], right=True)
    # Rounding may point past the last token that has any mass.
    last = (mass < mass[:, -1:]).sum(-1, keepdim=True)
    token = torch.minimum(token, last)
    return token[:, 0], logprobs.gather(1, token)[:, 0]
