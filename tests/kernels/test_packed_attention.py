"""packed_attention against a float64 formula, forward and backward, and its rows against themselves alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from ppomax_kernels.internal.packed_attention import packed_attention
from torch import Tensor

LENGTHS = [(1,), (16, 17), (5, 1, 40, 33)]


def drawn(lengths: tuple[int, ...], heads: int, groups: int, dim: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    shapes = [(sum(lengths), n, dim) for n in (heads, groups, groups, heads)]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return [torch.randn(shape, generator=generator) for shape in shapes], ends


def by_formula(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, window: int) -> Tensor:
    parts = []
    for a, b in pairwise(ends.tolist()):
        repeat = query.shape[1] // key.shape[1]
        q, k, v = query[a:b], key[a:b].repeat_interleave(repeat, 1), value[a:b].repeat_interleave(repeat, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        allowed = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        if window:
            allowed = allowed.triu(1 - window)
        parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v))
    return torch.cat(parts)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(1, 1, 8), (4, 2, 20), (6, 1, 33)])
@pytest.mark.parametrize("window", [0, 4, 100])
def test_equals_the_formula_and_its_gradients(
    lengths: tuple[int, ...], heads: int, groups: int, dim: int, window: int
) -> None:
    (*parts, upstream), ends = drawn(lengths, heads, groups, dim)
    found = []
    for exact in (False, True):
        leaves = [x.to(torch.float64 if exact else torch.float32, copy=True).requires_grad_() for x in parts]
        if exact:
            out = by_formula(*leaves, ends, dim**-0.5, window)
        else:
            out = packed_attention(*leaves, ends, scale=dim**-0.5, window=window)
        out.backward(upstream.to(out.dtype))
        found.append([out.detach(), *(x.grad for x in leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_a_sequence_does_not_depend_on_the_others(window: int) -> None:
    (q, k, v, _), ends = drawn(LENGTHS[-1], 4, 2, 20)
    whole = packed_attention(q, k, v, ends, scale=0.3, window=window)
    for a, b in pairwise(ends.tolist()):
        own = torch.tensor([0, b - a], dtype=torch.int32)
        assert torch.equal(whole[a:b], packed_attention(q[a:b], k[a:b], v[a:b], own, scale=0.3, window=window))


def test_views_as_layers_hand_them_over() -> None:
    (q, k, v, _), ends = drawn((5, 9), 4, 2, 8)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(packed_attention(*turned, ends, scale=0.3), packed_attention(q, k, v, ends, scale=0.3))
