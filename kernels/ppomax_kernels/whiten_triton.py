# mypy: allow-untyped-defs
"""Masked moments (count, mean, sum of squared deviations), and the map (x - mean) / sqrt(var + eps) with them.
Moments read x once, 4 B an element, in fp64 from the first sum on: each block of 1024 has its own mean and deviations
from it, and blocks are combined in order by Chan's rule, so a large mean costs no digits. One launch up to 8192
elements, two beyond (see reduce_triton.py). The map reads x again and writes it: one launch, no read-back of moments.
Left out on purpose: one kernel for both, which would need every program to wait for all others."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import reduce_triton as plan
from .backends.launch_triton import Case, floats, integers, launch, mask_bytes
from .backends.reduce_triton import kept

MAP_BLOCK = 1024
MAP_WARPS = 4


@triton.jit
def _combine(count, mean, squares, count2, mean2, squares2):
    """Moments of two sets together (Chan, Golub, LeVeque 1979); empty sets do no harm."""
    both = count + count2
    share = count2 / tl.where(both > 0.0, both, 1.0)
    apart = mean2 - mean
    return both, mean + apart * share, squares + squares2 + apart * apart * count * share


@triton.jit(do_not_specialize=["N", "chunk"])
def _moments_kernel(x_ptr, mask_ptr, scratch_ptr, moments_ptr, N, chunk, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, N)
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        keep = kept(mask_ptr, at, stop)
        x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float64)
        here = tl.sum(tl.where(keep, 1.0, 0.0).to(tl.float64), 0)
        mean_here = tl.sum(x, 0) / tl.where(here > 0.0, here, 1.0)
        d = tl.where(keep, x - mean_here, 0.0)
        count, mean, squares = _combine(count, mean, squares, here, mean_here, tl.sum(d * d, 0))
    if scratch_ptr is None:
        tl.store(moments_ptr, count)
        tl.store(moments_ptr + 1, mean)
        tl.store(moments_ptr + 2, squares)
    else:
        row = scratch_ptr + tl.program_id(0)
        programs = tl.num_programs(0).to(tl.int64)
        tl.store(row, count)
        tl.store(row + programs, mean)
        tl.store(row + 2 * programs, squares)


@triton.jit(do_not_specialize=["programs"])
def _moments_finish_kernel(scratch_ptr, moments_ptr, programs):
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    for row in range(programs):
        part = scratch_ptr + row
        count, mean, squares = _combine(
            count, mean, squares, tl.load(part), tl.load(part + programs), tl.load(part + 2 * programs)
        )
    tl.store(moments_ptr, count)
    tl.store(moments_ptr + 1, mean)
    tl.store(moments_ptr + 2, squares)


@triton.jit(do_not_specialize=["N"])
def _whiten_kernel(x_ptr, mask_ptr, moments_ptr, out_ptr, N, eps, SHIFT_MEAN: tl.constexpr, BLOCK: tl.constexpr):
    count = tl.load(moments_ptr)
    mean = tl.load(moments_ptr + 1)
    variance = tl.load(moments_ptr + 2) / tl.where(count > 1.0, count, 1.0)
    scale = 1.0 / tl.sqrt(variance + eps)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = kept(mask_ptr, at, N)
    x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float64)
    y = (x - mean) * scale
    if not SHIFT_MEAN:
        y += mean
    tl.store(out_ptr + at, tl.where(keep, y, 0.0).to(tl.float32), mask=at < N)


def moments_triton(x: Tensor, mask: Tensor | None) -> Tensor:
    n = x.numel()
    count, chunk = plan.programs(n)
    moments = x.new_empty((3,), dtype=torch.float64)
    partial = plan.scratch(x, 3, count, torch.float64)
    launch(
        _moments_kernel, (count,), x, mask_bytes(mask), partial, moments, n, chunk,
        BLOCK=plan.BLOCK, num_warps=plan.WARPS,
    )  # fmt: skip
    if partial is not None:
        launch(_moments_finish_kernel, (1,), partial, moments, count, num_warps=1)
    return moments


def whiten_triton(x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, eps: float) -> Tensor:
    out = x.new_empty(x.shape, dtype=torch.float32)
    n = out.numel()
    if n:
        launch(
            _whiten_kernel, (triton.cdiv(n, MAP_BLOCK),), x, mask_bytes(mask), moments, out, n, eps,
            SHIFT_MEAN=shift_mean, BLOCK=MAP_BLOCK, num_warps=MAP_WARPS,
        )  # fmt: skip
    return out


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    stats = floats(3, dtype=torch.float64)
    for dtype, n, full in itertools.product((torch.float32, torch.bfloat16), (4096, 65536), (False, True)):
        z, m = floats(n, dtype=dtype), integers(n, dtype=torch.bool) if full else None
        name = f"{str(dtype)[6:]} N={n}{' mask' if full else ''}"
        yield name, partial(moments_triton, z, m)
        yield name, partial(whiten_triton, z, m, stats, full, 1e-8)
