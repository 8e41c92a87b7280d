# mypy: allow-untyped-defs
"""Rotary position embedding of query and key of one layer in one launch, without a gradient: a program turns all heads
of one token, query's and key's."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.launch_triton import Case, floats, launch


@triton.jit
def _turn(y_ptr, x_ptr, head_stride, cosine, sine, cosine2, sine2, HEADS: tl.constexpr, HALF: tl.constexpr,
          ROWS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    heads = tl.arange(0, ROWS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    inside = (heads < HEADS) & (lanes < HALF)
    low = tl.load(x_ptr + heads * head_stride + lanes, mask=inside, other=0.0)
    high = tl.load(x_ptr + heads * head_stride + HALF + lanes, mask=inside, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    tl.store(y_ptr + heads * 2 * HALF + lanes, a * cosine - b * sine, mask=inside)
    tl.store(y_ptr + heads * 2 * HALF + HALF + lanes, b * cosine2 + a * sine2, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _rotate_kernel(
    q_ptr, k_ptr, query_ptr, key_ptr, cosine_ptr, sine_ptr, tokens, query_batch, query_token, query_head, key_batch,
    key_token, key_head, angle_batch, HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    angle = batch * angle_batch + token * 2 * HALF + lanes
    known = lanes < HALF
    cosine = tl.load(cosine_ptr + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sine_ptr + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    cosine2 = tl.load(cosine_ptr + angle + HALF, mask=known, other=0.0).to(tl.float32)[None, :]
    sine2 = tl.load(sine_ptr + angle + HALF, mask=known, other=0.0).to(tl.float32)[None, :]
    there = batch * tokens + token
    _turn(
        q_ptr + there * HEADS * 2 * HALF, query_ptr + batch * query_batch + token * query_token, query_head, cosine,
        sine, cosine2, sine2, HEADS, HALF, QUERIES, LANES,
    )  # fmt: skip
    _turn(
        k_ptr + there * GROUPS * 2 * HALF, key_ptr + batch * key_batch + token * key_token, key_head, cosine, sine,
        cosine2, sine2, GROUPS, HALF, KEYS, LANES,
    )  # fmt: skip


def rotate_triton(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """query (B, H, T, D) and key (B, G, T, D) -> both turned, in memory as (B, T, H, D) and (B, T, G, D)."""
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    batch, heads, tokens, dim = query.shape
    groups = key.shape[1]
    q, k = (x.new_empty(batch, tokens, x.shape[1], dim) for x in (query, key))
    if tokens and batch:
        q_strides, k_strides = ((x.stride(0), x.stride(2), x.stride(1)) for x in (query, key))
        launch(
            _rotate_kernel, (tokens, batch), q, k, query, key, cosine, sine, tokens, *q_strides, *k_strides,
            tokens * dim if cosine.shape[0] > 1 else 0, HEADS=heads, GROUPS=groups, HALF=dim // 2,
            QUERIES=triton.next_power_of_2(heads), KEYS=triton.next_power_of_2(groups),
            LANES=triton.next_power_of_2(dim // 2), num_warps=4,
        )  # fmt: skip
    return q.transpose(1, 2), k.transpose(1, 2)


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    kinds = ((torch.float32, 14, 2, 64), (torch.bfloat16, 32, 32, 128), (torch.bfloat16, 32, 8, 128))
    for dtype, heads, groups, dim in (*kinds, (torch.bfloat16, 8, 4, 256)):
        packed = floats(1, 8, (heads + 2 * groups) * dim, dtype=dtype)
        q = packed[..., : heads * dim].view(1, 8, heads, dim).transpose(1, 2)
        k = packed[..., heads * dim : (heads + groups) * dim].view(1, 8, groups, dim).transpose(1, 2)
        angles = floats(1, 8, dim, dtype=dtype)
        yield f"{str(dtype)[6:]} H={heads} G={groups} D={dim}", partial(rotate_triton, q, k, angles, angles)
