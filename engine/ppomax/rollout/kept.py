"""What a cut (top-k, top-p, an EOS that is forbidden for now) left each draw to choose from: one row a draw.

Small sets are ids: (N, k) int32, ascending, -1 behind the last. Others are bits: (N, ceil(V/8)) uint8, token v in bit
v%8 of byte v//8. Who knows a draw's set can renormalise over it, so that a ratio or a KL is that of the distribution
that was sampled from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST_IDS = 64
"""A top-k up to this is recorded as ids: 4k bytes a token, where bits take V/8."""


class Cut(NamedTuple):
    """Which tokens may be drawn."""

    top_k: int
    top_p: float
    temperature: float

    def by_ids(self, vocabulary: int) -> bool:
        """Whether its sets are ids, not bits."""
        return 0 < self.top_k <= min(MOST_IDS, vocabulary - 1)

    def row_bytes(self, vocabulary: int) -> int:
        """Of one draw's set."""
        return 4 * self.top_k if self.by_ids(vocabulary) else -(-vocabulary // 8)


def kept_rows(logits: Tensor, cut: Cut) -> Tensor:
    """(B, V) logits, -inf where a token is forbidden -> (B, W): the `top_k` likeliest tokens, of these the fewest whose
    mass at the temperature reaches `top_p`. Of ties at the border `top_k` up to 64 keeps as many as fit, all else keeps
    every one."""
    z, vocabulary = logits.float() / cut.temperature, logits.shape[-1]
    if cut.by_ids(vocabulary):
        values, ids = z.topk(cut.top_k, -1)
        kept = (values > -torch.inf) & _nucleus(values, cut.top_p)
        ids = torch.where(kept, ids, vocabulary).sort(-1).values
        return ids.masked_fill_(ids == vocabulary, -1).int()
    keep = z > -torch.inf
    if 0 < cut.top_k < vocabulary:
        keep &= z >= z.topk(cut.top_k, -1).values[:, -1:]
    if cut.top_p < 1:
        values = z.masked_fill(~keep, -torch.inf).sort(-1, descending=True).values
        inside = _nucleus(values, cut.top_p)
        keep &= z >= values.gather(-1, inside.sum(-1, keepdim=True).sub(1).clamp(min=0))
    return _packed(keep)


def only_kept(logits: Tensor, kept: Tensor) -> Tensor:
    """(N, V) logits -> those of the sets `kept` (N, W): (N, W) where the sets are ids, (N, V) where they are bits;
    -inf where nothing is kept. Differentiable."""
    if kept.dtype == torch.uint8:
        return logits.masked_fill(~_unpacked(kept, logits.shape[-1]), -torch.inf)
    return logits.gather(-1, kept.long().clamp(min=0)).masked_fill(kept < 0, -torch.inf)


def column_of(tokens: Tensor, kept: Tensor) -> Tensor:
    """(N,) where `only_kept` has each row's token."""
    return tokens if kept.dtype == torch.uint8 else (kept == tokens[:, None]).int().argmax(-1)


def token_at(columns: Tensor, kept: Tensor) -> Tensor:
    """(N,) the tokens that `only_kept` has in these columns; -1 stays -1."""
    if kept.dtype == torch.uint8:
        return columns
    found = kept.gather(-1, columns.clamp(min=0)[:, None])[:, 0].long()
    return torch.where(columns < 0, columns, found)


def _nucleus(descending: Tensor, top_p: float) -> Tensor:
    """Whether what stands before each entry has less than `top_p` of the row's mass."""
    weight = (descending - descending[:, :1]).exp().double()
    total = weight.sum(-1, keepdim=True)
    return (weight.cumsum(-1) - weight) < top_p * total if top_p < 1 else torch.ones_like(weight, dtype=torch.bool)


def _packed(keep: Tensor) -> Tensor:
    bits = pad(keep, (0, -keep.shape[-1] % 8)).view(len(keep), -1, 8)
    return (bits * _weights(keep)).sum(-1, dtype=torch.uint8)


def _unpacked(kept: Tensor, vocabulary: int) -> Tensor:
    return ((kept[:, :, None] & _weights(kept)) != 0).view(len(kept), -1)[:, :vocabulary]


def _weights(like: Tensor) -> Tensor:
    return torch.bitwise_left_shift(
        torch.ones(8, dtype=torch.uint8, device=like.device), torch.arange(8, dtype=torch.uint8, device=like.device)
    )
