# mypy: allow-untyped-defs
"""rms_norm, and the residual add before it, without a gradient: a row is read once and stays in registers; rows
narrower than 1,024 share a program. With `delta` the sum x + delta is rounded to x's dtype first and written out, as
the module that it replaces would have handed it on."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.launch_triton import Case, floats, launch

TILE = 1024
"""Elements of narrow rows to a program."""


@triton.jit(do_not_specialize=["rows", "inner"])
def _rms_norm_kernel(
    y_ptr, x_ptr, delta_ptr, sum_ptr, weight_ptr, rows, inner, outer, offset, eps, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    inside = (row < rows) & (lanes < WIDTH)
    place = row.to(tl.int64) * WIDTH + lanes
    there = (row // inner).to(tl.int64) * outer + row % inner * WIDTH + lanes
    x = tl.load(x_ptr + there, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta_ptr + place, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + place, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    weight = tl.load(weight_ptr + lanes, mask=lanes < WIDTH, other=0.0).to(tl.float32) + offset
    tl.store(y_ptr + place, x * scale[:, None] * weight, mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(y, x, y, y, weight, offset, eps, add=False)
    return y


def add_rms_norm_triton(x: Tensor, delta: Tensor, weight: Tensor, offset: float, eps: float) -> tuple[Tensor, Tensor]:
    total, y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(y, x, delta.contiguous(), total, weight, offset, eps, add=True)
    return total, y


def _launch(
    y: Tensor, x: Tensor, delta: Tensor, total: Tensor, weight: Tensor, offset: float, eps: float, *, add: bool
) -> None:
    width = weight.shape[0]
    rows, lanes = x.numel() // width, triton.next_power_of_2(width)
    if not x.is_contiguous() and _in_groups(x):
        inner, outer = x.shape[-2], x.stride(-3)
    else:
        x, inner, outer = x.contiguous(), max(1, rows), 0
    together = max(1, TILE // lanes)
    if rows:
        launch(
            _rms_norm_kernel, (-(-rows // together),), y, x, delta, total, weight, rows, inner, outer, offset, eps,
            WIDTH=width, ROWS=together, LANES=lanes, ADD=add, num_warps=max(4, min(16, lanes // 512)),
        )  # fmt: skip


def _in_groups(x: Tensor) -> bool:
    """Whether rows lie side by side, groups of them equally far apart: heads, as columns of a wider product."""
    return x.ndim >= 3 and x.stride()[-2:] == (x.shape[-1], 1) and all(n == 1 for n in x.shape[:-3])


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    for dtype, width in ((torch.float32, 896), (torch.bfloat16, 128), (torch.bfloat16, 4096), (torch.bfloat16, 5120)):
        x, weight = floats(1, 8, width, dtype=dtype), floats(width, dtype=dtype)
        yield f"{str(dtype)[6:]} D={width}", partial(rms_norm_triton, x, weight, 0.0, 1e-6)
        if width == 128:
            heads = floats(1, 8, 48, width, dtype=dtype)[:, :, :32]
            yield f"{str(dtype)[6:]} D={width} heads", partial(rms_norm_triton, heads, weight, 0.0, 1e-6)
        yield f"{str(dtype)[6:]} D={width} add", partial(add_rms_norm_triton, x, x, weight, 1.0, 1e-6)
