"""The KL divergence of two policies at given states over the whole vocabulary, in place of an estimate from the one
token that was drawn: no variance but that of the states. In plain torch, some rows of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ppomax.models import Head
from ppomax.recipe.cut import chunk_rows
from ppomax.rollout.kept import only_kept


def vocabulary_kl(
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref_head: Head,
    *,
    kept: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`(p * (p.log() - r.log())).sum(-1)` (N,) float32, nats, of `p = softmax(head.logits(hidden) / temperature)` and
    `r` of the reference's likewise; hidden: (N, D) each. kept: both over these tokens alone (rollout/kept.py). 0 to the
    bit where both have the same logits; never below 0 by more than rounding."""
    rows = chunk_rows(head)
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    for at in torch.arange(len(hidden), device=hidden.device).split(rows):
        one, two = (
            _log_softmax(x[at], of, None if kept is None else kept[at], temperature)
            for x, of in ((hidden, head), (ref_hidden, ref_head))
        )
        p = one.exp()
        parts.append((p * (one - two).masked_fill(p == 0, 0.0)).sum(-1))
    return torch.cat(parts)


def _log_softmax(hidden: Tensor, head: Head, kept: Tensor | None, temperature: float) -> Tensor:
    z = head.logits(hidden).float() / temperature
    return (z if kept is None else only_kept(z, kept)).log_softmax(-1)
