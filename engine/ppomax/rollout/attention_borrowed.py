"""Attention of a rollout by kernels that are not ours: torch's.

A forward carries two kinds of rows: decoding rows, one query each, over the pages of their sequence; and the rows of a
prompt, which attend to the fresh keys of that prompt. For decoding pages are gathered: only where our kernels do not
serve. Prompts go through torch's variable-length attention on a GPU in half precision, which takes them as they lie;
elsewhere sequence by sequence, without a mask where a causal one is all there is to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from ppomax_kernels.backends import reference
from torch import Tensor, nn

from ppomax.models.varlen import serves, varlen
from ppomax.rollout.arena import Step


class AttentionTerms(NamedTuple):
    """What a layer asks of its attention: `softmax(cap(scale * q @ k))` over the last `window` keys. 0: no window, no
    cap."""

    scale: float
    window: int
    softcap: float


def decode_sdpa(query: Tensor, pages: tuple[Tensor, Tensor], step: Step, terms: AttentionTerms) -> Tensor:
    """query (B, H, D) of the first rows of a step, over pages as `internal.paged_attention` has them."""
    n, blocks = len(query), -(-step.longest // pages[0].shape[-1])
    keys, values = reference.read_pages(*pages, step.tables[step.slots[:n].long(), :blocks])
    at, own = torch.arange(keys.shape[2], device=query.device), step.positions[:n, None]
    return _sdpa(query[:, :, None], keys, values, _seen(at, own, terms.window)[:, None, None], terms)[:, :, 0]


def attend_prompts(query: Tensor, key: Tensor, value: Tensor, step: Step, terms: AttentionTerms) -> Tensor:
    """query (N, H, D), key and value (N, G, D) of a step's prompts, each of which attends to itself."""
    if query.is_cuda and not terms.softcap and serves(query.shape[-1], query.dtype):
        longest = max(step.prompts)
        return varlen(query, key, value, step.prompt_ends, longest, scale=terms.scale, window=terms.window)
    parts = []
    for mine in zip(*(x.split(step.prompts) for x in (query, key, value)), strict=True):
        length = len(mine[0])
        q, k, v = (x.transpose(0, 1)[None] for x in mine)
        seen = None
        if terms.softcap or 0 < terms.window < length:
            at = torch.arange(length, device=query.device)
            seen = _seen(at, at[:, None], terms.window)
        parts.append(_sdpa(q, k, v, seen, terms)[0].transpose(0, 1))
    return torch.cat(parts)


def _seen(at: Tensor, own: Tensor, window: int) -> Tensor:
    """Which of the positions `at` a query at position `own` attends to."""
    return (at <= own) & (at > own - window) if window else at <= own


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, terms: AttentionTerms) -> Tensor:
    """(B, H, T, D) over (B, G, L, D); None: causal. Key heads are repeated, since torch's fast kernels refuse groups
    beside a mask; it has no cap, so a capped one is spelt out."""
    repeat = query.shape[1] // keys.shape[1]
    if repeat > 1:
        keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
    if not terms.softcap:
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, is_causal=seen is None, scale=terms.scale
        )
    assert seen is not None
    scores = terms.scale * query @ keys.transpose(-1, -2)
    scores = terms.softcap * torch.tanh(scores / terms.softcap)
    weights = torch.softmax(scores.float().masked_fill(~seen, -torch.inf), -1).to(values.dtype)
    return weights @ values
