"""Root-mean-square norm on a CPU, in one pass over a row that stays in the first cache; eager torch takes six kernels
for the few rows that decoding has. Internal to the engine's rollout: no gradient."""

from torch import Tensor

from ..dispatch import late
from .packed_linear import DTYPES

_run = late("backends.native_internal", "rms_norm_cpu")


def rms_norm(x: Tensor, weight: Tensor, *, offset: float = 0.0, eps: float) -> Tensor:
    """`x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)` for x (..., D) and weight (D,) in
    float32 or bfloat16 on a CPU, computed in float32 and rounded once to x's dtype; offset 1 is Gemma's form. x is
    copied if it is not contiguous. ValueError if they do not fit."""
    if weight.ndim != 1 or not len(weight) or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"rms_norm: x must be (..., D) and weight (D,), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    ready = x.is_cpu and weight.is_cpu and weight.is_contiguous()
    if not (ready and x.dtype in DTYPES and weight.dtype in DTYPES):
        raise ValueError(
            f"rms_norm: x and weight must be float32 or bfloat16 on the CPU, got {x.dtype} and {weight.dtype}"
        )
    return _run(x if x.is_contiguous() else x.contiguous(), weight, offset, eps)  # type: ignore[no-any-return]
