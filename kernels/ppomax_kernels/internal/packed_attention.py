"""Causal attention within packed sequences on a CPU, differentiable: forward as the rollout's paged_attention computes
it, page by page, so that a token's result is the same to the bit when it is decoded, scored or trained on, whatever
stands beside it. Nothing is padded in the forward; the gradients are those of torch's scaled_dot_product_attention on
padded rows. Internal to the engine."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..library import first_derivative
from .paged_attention import PAGE, empty_pages, paged_attention


class Places(NamedTuple):
    """Where the tokens of packed sequences stand."""

    tables: Tensor
    """(S, blocks) int32, pages of each sequence."""
    sequences: Tensor
    """(N,) int32, which each token belongs to."""
    positions: Tensor
    """(N,) int32, and where in it."""
    pages: int
    """Of all."""


def places_of(ends: Tensor) -> Places:
    """Of sequences with these ends: (S+1,) int32 on a CPU, from 0 to N."""
    lengths = ends.diff()
    counts = (lengths + PAGE - 1) // PAGE
    first = counts.cumsum(0) - counts
    tables = (first[:, None] + torch.arange(int(counts.max()))).int()
    sequences = torch.arange(len(lengths)).repeat_interleave(lengths).int()
    positions = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(lengths)
    pages = int(counts.sum())
    return Places(tables.clamp(max=pages - 1).contiguous(), sequences, positions.int(), pages)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, window: int) -> Tensor:
        ctx.save_for_backward(query, key, value, ends)
        ctx.scale, ctx.window = scale, window
        where = places_of(ends)
        groups, dim = key.shape[1:]
        pages = empty_pages(where.pages, groups, dim, value.shape[2], key.dtype)
        return paged_attention(query, key, value, *pages, *where[:3], scale=scale, window=window, impl="cpu")

    @staticmethod
    @first_derivative
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *parts, ends = ctx.saved_tensors
        where = places_of(ends)
        count, longest = len(ends) - 1, int(ends.diff().max())
        slots = where.sequences.long() * longest + where.positions

        def padded(x: Tensor) -> Tensor:
            """(N, H, D) -> (S, H, longest, D)"""
            rows = x.new_zeros(count * longest, *x.shape[1:]).index_copy(0, slots, x)
            return rows.unflatten(0, (count, longest)).transpose(1, 2)

        with torch.enable_grad():
            leaves = q, k, v = [padded(x).requires_grad_() for x in parts]
            mask = None
            if ctx.window and longest > ctx.window:
                mask = torch.ones(longest, longest, dtype=torch.bool).tril().triu(1 - ctx.window)
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=ctx.scale, enable_gqa=True
            )
        grads = torch.autograd.grad(out, leaves, padded(dout))
        return *(g.transpose(1, 2).flatten(0, 1).index_select(0, slots) for g in grads), None, None, None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *, scale: float, window: int = 0
) -> Tensor:
    """`softmax(scale * query @ keys.T) @ values` (N, H, D) for each token over those of its own sequence up to itself,
    the last `window` of them (0: all): query (N, H, D), key and value (N, G, D) in float32 on a CPU, the last dimension
    contiguous, H a multiple of G; ends (S+1,) int32, where each sequence starts and the last ends. Once
    differentiable."""
    return _PackedAttention.apply(query, key, value, ends, scale, window)  # type: ignore[no-any-return, no-untyped-call]
