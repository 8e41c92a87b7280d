# mypy: allow-untyped-defs
"""gated_mul: BLOCK columns of a row a program."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.launch_triton import Case, floats, launch
from ..backends.math_triton import LOG2E, tanh

BLOCK = 2048


@triton.jit
def _gated_mul_kernel(
    y_ptr, gate_ptr, up_ptr, gate_row, up_row, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate = tl.load(gate_ptr + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        y = 0.5 * gate * (1.0 + tanh(inner)) * up
    else:
        y = gate / (1.0 + tl.exp2(-(gate * LOG2E))) * up
    tl.store(y_ptr + row * WIDTH + at, y, mask=inside)


def gated_mul_triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    width, shape = gate.shape[-1], gate.shape
    y = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        gate, up = (_rows(x, width) for x in (gate, up))
        launch(
            _gated_mul_kernel, (len(gate), -(-width // BLOCK)), y, gate, up, gate.stride(0), up.stride(0), WIDTH=width,
            GELU=activation == "gelu_tanh", BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return y


def _rows(x: Tensor, width: int) -> Tensor:
    """(rows, width), the last dimension contiguous."""
    x = x.reshape(-1, width)  # a view where rows are equally far apart
    return x if x.stride(1) == 1 else x.contiguous()


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    for dtype, width in ((torch.float32, 4864), (torch.bfloat16, 11008), (torch.bfloat16, 13824)):
        for activation in ("silu", "gelu_tanh"):
            x = floats(8, 2 * width, dtype=dtype)
            yield f"{str(dtype)[6:]} {activation}", partial(gated_mul_triton, x[:, :width], x[:, width:], activation)
