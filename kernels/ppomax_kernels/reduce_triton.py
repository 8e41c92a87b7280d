# mypy: allow-untyped-defs
"""How losses and moments are summed over tokens: deterministic, whatever the number of multiprocessors.

Up to ONE_PROGRAM tokens one program of 512 threads walks them all, 2048 at a time, and finishes: one launch, nothing
to combine, no scratch. 16384 tokens of a loss are some 300 KB, a few microseconds for one multiprocessor, which is what
a launch costs anyway. Beyond that each program sums one block of 2048 tokens into a row of scratch (torch.empty, never
cleared), and a second launch of one program adds the rows in a fixed order. A counter with which the last program
finishes would save that launch, but it must be zero beforehand: clearing it is a launch too, and one that resets itself
is hidden state, shared by streams and left wrong by a kernel that was killed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 16
ONE_PROGRAM = 16384
ROWS = 256  # of scratch, at a time, in the second launch


def programs(n: int) -> tuple[int, int]:
    """(programs, tokens of each)."""
    return (1, n) if n <= ONE_PROGRAM else (-(-n // BLOCK), BLOCK)


def scratch(like: Tensor, columns: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """One row of partial results for each of `count` programs; None where one program finishes by itself."""
    return None if count == 1 else like.new_empty((columns, count), dtype=dtype)


@triton.jit
def kept(mask_ptr, at, stop):
    """Which of the tokens `at` count."""
    inside = at < stop
    if mask_ptr is None:
        return inside
    return tl.load(mask_ptr + at, mask=inside, other=0) != 0


@triton.jit
def total(scratch_ptr, column, count, ROWS: tl.constexpr):
    """Sum of a column of scratch, rows in order."""
    lanes = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, count, ROWS):
        at = start + lanes
        sums += tl.load(scratch_ptr + column * count + at, mask=at < count, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def one_over(tokens, normalizer_ptr, norm_value):
    """1 / what sums are divided by: the tensor, or the number if above 0, or the tokens; 0 if there is nothing."""
    divisor = tl.where(norm_value > 0.0, norm_value, tokens)
    if normalizer_ptr is not None:
        divisor = tl.load(normalizer_ptr)
    return tl.where(divisor > 0.0, 1.0 / tl.where(divisor > 0.0, divisor, 1.0), 0.0)
