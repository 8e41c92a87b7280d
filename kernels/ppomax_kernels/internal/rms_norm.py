"""Root-mean-square norm on a CPU, in one pass over a row that stays in the first cache, and its gradient in another;
eager torch takes six kernels and keeps what four of them made. Internal to the engine."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import late
from .packed_linear import DTYPES

_run = late("backends.native_internal", "rms_norm_cpu")
_run_back = late("backends.native_internal", "rms_norm_backward_cpu")


def rms_norm(x: Tensor, weight: Tensor, *, offset: float = 0.0, eps: float) -> Tensor:
    """`x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)` for x (..., D) and weight (D,) in
    float32 or bfloat16 on a CPU, computed in float32 and rounded once to x's dtype; offset 1 is Gemma's form.
    Differentiable in float32; the gradient of weight is summed in an order of its own, whatever the threads. x is
    copied if it is not contiguous. ValueError if they do not fit."""
    if weight.ndim != 1 or not weight.shape[0] or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"rms_norm: x must be (..., D) and weight (D,), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    ready = x.is_cpu and weight.is_cpu and weight.is_contiguous()
    if not (ready and x.dtype in DTYPES and weight.dtype in DTYPES):
        raise ValueError(
            f"rms_norm: x and weight must be float32 or bfloat16 on the CPU, got {x.dtype} and {weight.dtype}"
        )
    x = x if x.is_contiguous() else x.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if x.dtype != torch.float32 or weight.dtype != torch.float32:
            raise ValueError(f"rms_norm: gradients are of float32 alone, got {x.dtype} and {weight.dtype}")
        return _RmsNorm.apply(x, weight, offset, eps)  # type: ignore[no-any-return,no-untyped-call]
    return _run(x, weight, offset, eps)  # type: ignore[no-any-return]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.numbers = offset, eps
        return _run(x, weight, offset, eps)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx, dweight = _run_back(x, weight, *ctx.numbers, dy.contiguous())
        return dx, dweight, None, None
