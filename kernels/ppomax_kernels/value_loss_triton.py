# mypy: allow-untyped-defs
"""Clipped value loss, all its metrics and each token's gradient, in one pass over the tokens.
l = 1/2 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) ; dl/dV = V - R, or 0 where the clipped error is
the larger one. Reads 12 B a token in fp32 (13 with a mask), writes 4 B if a gradient is wanted. Sums: see
reduce_triton.py (one launch up to 8192 tokens, two beyond). The gradient written is that of the masked sum; the
backward scales it by `scale`.
Inside the clip interval V_old + (V - V_old) is V itself, not its rounding: else rounding would count as clipping."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import reduce_triton as plan
from .backends.launch_triton import Case, floats, integers, launch, mask_bytes
from .backends.math_triton import clamp
from .backends.reduce_triton import kept, one_over, total
from .metrics import VALUE_METRICS

COLUMNS = len(VALUE_METRICS)


@triton.jit
def value_terms(values, old_values, returns, clip):
    """Per token: twice the loss, its half slope in V, the unclipped squared error, whether the clip decided."""
    error = values - returns
    plain = error * error
    moved = values - old_values
    bounded = old_values + clamp(moved, -clip, clip) - returns
    outside = (clip >= 0.0) & (tl.abs(moved) > clip)
    was_clipped = outside & (bounded * bounded > plain)
    return tl.where(was_clipped, bounded * bounded, plain), tl.where(was_clipped, 0.0, error), plain, was_clipped


@triton.jit
def _write(
    v_loss, clipfrac, value_mean, return_mean, squared_error, tokens,
    loss_ptr, metrics_ptr, scale_ptr, normalizer_ptr, norm_value,
):  # fmt: skip
    """Sums over tokens -> loss, metrics in the order of value_loss.METRICS, scale."""
    scale = one_over(tokens, normalizer_ptr, norm_value)
    loss = 0.5 * (v_loss * scale)
    tl.store(loss_ptr, loss)
    tl.store(scale_ptr, scale)
    tl.store(metrics_ptr, loss)
    tl.store(metrics_ptr + 1, clipfrac * scale)
    tl.store(metrics_ptr + 2, value_mean * scale)
    tl.store(metrics_ptr + 3, return_mean * scale)
    tl.store(metrics_ptr + 4, squared_error * scale)
    tl.store(metrics_ptr + 5, tokens)


@triton.jit(do_not_specialize=["N", "chunk"], do_not_specialize_on_alignment=["normalizer_ptr"])
def _value_loss_kernel(
    values_ptr, old_values_ptr, returns_ptr, mask_ptr, dvalues_ptr, scratch_ptr, loss_ptr, metrics_ptr, scale_ptr,
    normalizer_ptr, N, chunk, norm_value, clip, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, N)
    lanes = tl.arange(0, BLOCK)
    v_loss = tl.zeros((BLOCK,), tl.float32)
    clipfrac = tl.zeros((BLOCK,), tl.float32)
    value_mean = tl.zeros((BLOCK,), tl.float32)
    return_mean = tl.zeros((BLOCK,), tl.float32)
    squared_error = tl.zeros((BLOCK,), tl.float32)
    tokens = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        at = first + lanes
        keep = kept(mask_ptr, at, stop)
        values = tl.load(values_ptr + at, mask=keep, other=0.0).to(tl.float32)
        old_values = tl.load(old_values_ptr + at, mask=keep, other=0.0).to(tl.float32)
        returns = tl.load(returns_ptr + at, mask=keep, other=0.0).to(tl.float32)
        twice, slope, plain, was_clipped = value_terms(values, old_values, returns, clip)
        if dvalues_ptr is not None:
            tl.store(dvalues_ptr + at, slope, mask=at < stop)
        v_loss += twice  # a masked token was loaded as zeros, and every term of it is 0
        clipfrac += tl.where(was_clipped, 1.0, 0.0)
        value_mean += values
        return_mean += returns
        squared_error += plain
        tokens += tl.where(keep, 1.0, 0.0)
    if scratch_ptr is None:
        _write(
            tl.sum(v_loss, 0), tl.sum(clipfrac, 0), tl.sum(value_mean, 0), tl.sum(return_mean, 0),
            tl.sum(squared_error, 0), tl.sum(tokens, 0), loss_ptr, metrics_ptr, scale_ptr, normalizer_ptr, norm_value,
        )  # fmt: skip
    else:
        row = scratch_ptr + tl.program_id(0)
        count = tl.num_programs(0).to(tl.int64)
        tl.store(row, tl.sum(v_loss, 0))
        tl.store(row + count, tl.sum(clipfrac, 0))
        tl.store(row + 2 * count, tl.sum(value_mean, 0))
        tl.store(row + 3 * count, tl.sum(return_mean, 0))
        tl.store(row + 4 * count, tl.sum(squared_error, 0))
        tl.store(row + 5 * count, tl.sum(tokens, 0))


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["normalizer_ptr"])
def _value_loss_finish_kernel(
    scratch_ptr, loss_ptr, metrics_ptr, scale_ptr, normalizer_ptr, count, norm_value, ROWS: tl.constexpr
):
    _write(
        total(scratch_ptr, 0, count, ROWS), total(scratch_ptr, 1, count, ROWS), total(scratch_ptr, 2, count, ROWS),
        total(scratch_ptr, 3, count, ROWS), total(scratch_ptr, 4, count, ROWS), total(scratch_ptr, 5, count, ROWS),
        loss_ptr, metrics_ptr, scale_ptr, normalizer_ptr, norm_value,
    )  # fmt: skip


def value_loss_triton(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    norm_value: float,
    clip: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = plan.loss_outputs(values, COLUMNS, normalizer, need_grad)
    launch(
        _value_loss_kernel, (out.programs,), values, old_values, returns, mask_bytes(mask),
        out.gradient if need_grad else None, out.partial, *out.results, values.numel(), out.chunk, norm_value, clip,
        BLOCK=plan.BLOCK, num_warps=plan.WARPS,
    )  # fmt: skip
    if out.partial is not None:
        launch(
            _value_loss_finish_kernel, (1,), out.partial, *out.results, out.programs, norm_value, ROWS=plan.ROWS,
            num_warps=4,
        )  # fmt: skip
    return out.loss, out.metrics, out.gradient, out.scale


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    for dtype, n, full in itertools.product((torch.float32, torch.bfloat16), (4096, 65536), (False, True)):
        z, m = floats(n, dtype=dtype), integers(n, dtype=torch.bool) if full else None
        name = f"{str(dtype)[6:]} N={n}{' mask, gradient' if full else ''}"
        norm = floats() if full else None
        yield name, partial(value_loss_triton, z, z, z, m, norm, 0.0, 0.2, full)
