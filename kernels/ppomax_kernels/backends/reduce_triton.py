# mypy: allow-untyped-defs
"""How losses and moments are summed over tokens: deterministic, whatever the number of multiprocessors.

Up to ONE_PROGRAM tokens one program of 512 threads walks them all, 1024 at a time, and finishes: one launch, nothing
to combine, no scratch. 8192 tokens of a loss are some 150 KB, a few microseconds for one multiprocessor, which is what
a launch costs anyway. (2048 at a time would need more than the 128 registers that 512 threads may have.) Beyond that
each program sums one block of 1024 tokens into a column of scratch (torch.empty, never cleared), and a second launch of
one program adds the columns in a fixed order. A counter with which the last program finishes would save that launch,
but it must be zero beforehand: clearing it is a launch too, and one that resets itself is hidden state, shared by
streams and left wrong by a kernel that was killed."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS = 16
ONE_PROGRAM = 8192
ROWS = 256  # programs whose results the second launch adds at a time


def programs(n: int) -> tuple[int, int]:
    """(programs, tokens of each)."""
    return (1, n) if n <= ONE_PROGRAM else (-(-n // BLOCK), BLOCK)


def scratch(like: Tensor, columns: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A column of partial results for each of `count` programs; None where one program finishes by itself."""
    return None if count == 1 else like.new_empty((columns, count), dtype=dtype)


class LossOutputs(NamedTuple):
    """What a loss over `like` writes, and how its launches are laid out."""

    programs: int
    chunk: int
    loss: Tensor
    metrics: Tensor
    scale: Tensor
    gradient: Tensor
    """Of the shape of `like`; empty if none is wanted."""
    partial: Tensor | None
    """Scratch for a second launch; None where one finishes."""
    results: tuple[Tensor, Tensor, Tensor, Tensor | None]
    """As kernels take them: loss, metrics, scale, normalizer."""


def loss_outputs(like: Tensor, columns: int, normalizer: Tensor | None, need_grad: bool) -> LossOutputs:
    """Results and layout of a loss with so many metrics over the tokens of `like`."""
    count, chunk = programs(like.numel())
    loss, scale = (like.new_empty((), dtype=torch.float32) for _ in range(2))
    metrics = like.new_empty((columns,), dtype=torch.float32)
    gradient = like.new_empty(like.shape if need_grad else (0,), dtype=torch.float32)
    results = loss, metrics, scale, normalizer
    return LossOutputs(count, chunk, loss, metrics, scale, gradient, scratch(like, columns, count), results)


@triton.jit
def kept(mask_ptr, at, stop):
    """Which of the tokens `at` count."""
    inside = at < stop
    if mask_ptr is not None:
        inside = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    return inside


@triton.jit
def total(scratch_ptr, result, count, ROWS: tl.constexpr):
    """Sum of one of the results over programs, in order."""
    lanes = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, count, ROWS):
        at = start + lanes
        sums += tl.load(scratch_ptr + result * count + at, mask=at < count, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def one_over(tokens, normalizer_ptr, norm_value):
    """1 / what sums are divided by: the tensor, or the number if above 0, or the tokens; 0 if there is nothing."""
    divisor = tl.where(norm_value > 0.0, norm_value, tokens)
    if normalizer_ptr is not None:
        divisor = tl.load(normalizer_ptr)
    return tl.where(divisor > 0.0, 1.0 / tl.where(divisor > 0.0, divisor, 1.0), 0.0)
