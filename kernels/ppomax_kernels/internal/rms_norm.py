"""Root-mean-square norm in one pass over a row that stays in the first cache or in registers, and its gradient, on a
CPU, in another; eager torch takes six kernels and keeps what four of them made. Internal to the engine."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import Table, late, pick
from .packed_linear import DTYPES

FORWARD: Table = {
    "cpu": late("backends.native_internal", "rms_norm_cpu"),
    "triton": late("internal.rms_norm_triton", "rms_norm_triton"),
}
ADD: Table = {"triton": late("internal.rms_norm_triton", "add_rms_norm_triton")}
_run = late("backends.native_internal", "rms_norm_cpu")
_run_back = late("backends.native_internal", "rms_norm_backward_cpu")


class NormTerms(NamedTuple):
    """`rms_norm(x, **terms)`."""

    weight: Tensor
    offset: float
    eps: float


def rms_norm(x: Tensor, weight: Tensor, *, offset: float = 0.0, eps: float, impl: str = "auto") -> Tensor:
    """`x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)` for x (..., D) and weight (D,) in
    float32 or bfloat16, on a GPU also float16, computed in float32 and rounded once to x's dtype; offset 1 is Gemma's
    form. Differentiable on a CPU in float32; the gradient of weight is summed in an order of its own, whatever the
    threads. x is copied if it is not contiguous. ValueError if they do not fit."""
    name = "cpu" if x.is_meta else pick("rms_norm", impl, x.device, FORWARD)
    if weight.ndim != 1 or not weight.shape[0] or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"rms_norm: x must be (..., D) and weight (D,), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    dtypes = DTYPES if name == "cpu" else (*DTYPES, torch.float16)
    ready = x.device == weight.device and weight.is_contiguous()
    if not (ready and x.dtype in dtypes and weight.dtype in dtypes):
        raise ValueError(
            f"rms_norm: x and weight must be of {' or '.join(map(str, dtypes))} on one device, got {x.dtype} on "
            f"{x.device} and {weight.dtype} on {weight.device}"
        )
    if name == "triton":
        return FORWARD[name](x, weight, offset, eps)  # type: ignore[no-any-return]
    x = x if x.is_contiguous() else x.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if x.dtype != torch.float32 or weight.dtype != torch.float32:
            raise ValueError(f"rms_norm: gradients are of float32 alone, got {x.dtype} and {weight.dtype}")
        return _RmsNorm.apply(x, weight, offset, eps)  # type: ignore[no-any-return,no-untyped-call]
    return _run(x, weight, offset, eps)  # type: ignore[no-any-return]


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, *, offset: float = 0.0, eps: float, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`x + delta`, and `rms_norm` of it, on a GPU in one launch; no gradient. x and delta (..., D) of one shape and
    dtype, float32, bfloat16 or float16. ValueError if they do not fit."""
    name = pick("add_rms_norm", impl, x.device, ADD)
    if x.shape != delta.shape or x.dtype != delta.dtype or weight.ndim != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"add_rms_norm: x and delta must be (..., D) of one dtype and weight (D,), got {tuple(x.shape)} in "
            f"{x.dtype}, {tuple(delta.shape)} in {delta.dtype} and {tuple(weight.shape)}"
        )
    return ADD[name](x, delta, weight, offset, eps)  # type: ignore[no-any-return]


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
