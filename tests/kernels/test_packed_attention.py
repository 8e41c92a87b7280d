"""packed_attention on every instruction set against a float64 formula, forward and backward; its rows against
themselves alone, and against what decoding gives, to the bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from ppomax_kernels.internal.packed_attention import packed_attention
from ppomax_kernels.internal.paged_attention import PAGE, empty_pages, paged_attention
from torch import Tensor

LENGTHS = [(1,), (16, 17), (5, 1, 40, 33), (150, 2)]


def drawn(
    lengths: tuple[int, ...], heads: int, groups: int, dim: int, value_dim: int | None = None
) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and the gradient of the result; ends."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    out = dim if value_dim is None else value_dim
    shapes = [(sum(lengths), n, d) for n, d in ((heads, dim), (groups, dim), (groups, out), (heads, out))]
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
@pytest.mark.parametrize(("heads", "groups", "dims"), [(1, 1, (8, 8)), (4, 2, (20, 64)), (6, 1, (33, 7))], ids=str)
@pytest.mark.parametrize("window", [0, 4, 100])
def test_equals_the_formula_and_its_gradients(
    lengths: tuple[int, ...], heads: int, groups: int, dims: tuple[int, int], window: int, isa: int
) -> None:
    dim = dims[0]
    (*parts, upstream), ends = drawn(lengths, heads, groups, *dims)
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


@pytest.mark.parametrize("window", [0, 4, 70])
@pytest.mark.parametrize(("heads", "groups", "dims"), [(1, 1, (8, 8)), (6, 2, (32, 32)), (5, 1, (20, 33))], ids=str)
def test_a_token_s_bits_are_those_of_decoding(
    heads: int, groups: int, dims: tuple[int, int], window: int, isa: int
) -> None:
    lengths = LENGTHS[-1]
    (q, k, v, _), ends = drawn(lengths, heads, groups, *dims)
    whole = packed_attention(q, k, v, ends, scale=0.3, window=window)
    blocks = -(-max(lengths) // PAGE)
    pages = empty_pages(len(lengths) * blocks, groups, *dims, torch.float32)
    tables = torch.arange(len(lengths) * blocks, dtype=torch.int32).view(len(lengths), blocks)
    for s, (a, b) in enumerate(pairwise(ends.tolist())):
        for n in range(a, b):
            where = (torch.tensor([s], dtype=torch.int32), torch.tensor([n - a], dtype=torch.int32))
            now = slice(n, n + 1)
            one = paged_attention(q[now], k[now], v[now], *pages, tables, *where, scale=0.3, window=window)
            assert torch.equal(whole[now], one), (s, n - a)


def test_gradients_do_not_depend_on_threads() -> None:
    (*parts, upstream), ends = drawn(LENGTHS[2], 6, 2, 32)
    found, before = [], torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_() for x in parts]
        packed_attention(*leaves, ends, scale=0.3).backward(upstream)
        found.append([x.grad for x in leaves])
    torch.set_num_threads(before)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v, e: (q, k, v, e - 1), "cu_seqlens does not run from 0"),
        (lambda q, k, v, e: (q, k, v, torch.cat([e, e[-1:]])), "strictly increasing"),
        (lambda q, k, v, e: (q.double(), k, v, e), "float32"),
        (lambda q, k, v, e: (q, k.transpose(1, 2).contiguous().transpose(1, 2), v, e), "contiguous"),
        (lambda q, k, v, e: (q[:, :3], k, v, e), "multiple"),
        (lambda q, k, v, e: (q, k, v[:-1], e), "tokens"),
        (lambda q, k, v, e: (q, k, v, e.long()), "int32"),
    ],
    ids=["starts", "rises", "dtype", "strides", "heads", "tokens", "ends"],
)
def test_what_is_refused(change: object, words: str) -> None:
    (q, k, v, _), ends = drawn((5, 9), 4, 2, 8)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        packed_attention(*change(q, k, v, ends), scale=0.3)  # type: ignore[operator]
