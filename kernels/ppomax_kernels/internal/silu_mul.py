"""The gate of a SwiGLU block on a CPU, on gate and up projections that lie side by side. Internal to the engine's
rollout: no gradient."""

from torch import Tensor

from ..dispatch import late
from .packed_linear import DTYPES

_run = late("backends.native_internal", "silu_mul_cpu")


def silu_mul(x: Tensor) -> Tensor:
    """`torch.nn.functional.silu(x[..., :D]) * x[..., D:]` for x (..., 2 D) in float32 or bfloat16 on a CPU, computed in
    float32 and rounded once to x's dtype. x is copied if it is not contiguous. ValueError for another x."""
    if x.ndim < 1 or x.shape[-1] % 2 or not x.shape[-1] or x.dtype not in DTYPES or not x.is_cpu:
        raise ValueError(
            "silu_mul: x must be (..., 2 D) in float32 or bfloat16 on the CPU, got "
            f"{tuple(x.shape)} in {x.dtype} on {x.device}"
        )
    return _run(x if x.is_contiguous() else x.contiguous())  # type: ignore[no-any-return]
