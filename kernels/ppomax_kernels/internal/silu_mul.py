"""The gate of a SwiGLU block on a CPU, on gate and up projections that lie side by side, and its gradient. Internal to
the engine."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import late
from .packed_linear import DTYPES

_run = late("backends.native_internal", "silu_mul_cpu")
_run_back = late("backends.native_internal", "silu_mul_backward_cpu")


def silu_mul(x: Tensor) -> Tensor:
    """`torch.nn.functional.silu(x[..., :D]) * x[..., D:]` for x (..., 2 D) in float32 or bfloat16 on a CPU, computed in
    float32 and rounded once to x's dtype; differentiable in float32. x is copied if it is not contiguous. ValueError
    for another x."""
    if x.ndim < 1 or x.shape[-1] % 2 or not x.shape[-1] or x.dtype not in DTYPES or not (x.is_cpu or x.is_meta):
        raise ValueError(
            "silu_mul: x must be (..., 2 D) in float32 or bfloat16 on the CPU, got "
            f"{tuple(x.shape)} in {x.dtype} on {x.device}"
        )
    x = x if x.is_contiguous() else x.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        if x.dtype != torch.float32:
            raise ValueError(f"silu_mul: gradients are of float32 alone, got {x.dtype}")
        return _SiluMul.apply(x)  # type: ignore[no-any-return,no-untyped-call]
    return _run(x)  # type: ignore[no-any-return]


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return _run(x)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return _run_back(*ctx.saved_tensors, dy.contiguous())  # type: ignore[no-any-return]
