"""The gate of a SwiGLU or GeGLU block on a GPU, one launch. Internal to the engine's rollout: no gradient."""

import torch
from torch import Tensor

from ..backends import reference
from ..dispatch import Table, late, pick

FORWARD: Table = {"triton": late("internal.gated_mul_triton", "gated_mul_triton"), "ref": reference.gated_mul}
ACTIVATIONS = ("silu", "gelu_tanh")


def gated_mul(gate: Tensor, up: Tensor, activation: str, *, impl: str = "auto") -> Tensor:
    """`act(gate) * up` for gate and up (..., D) in float32, bfloat16 or float16, computed in float32 and rounded once
    to their dtype; activation "silu" or "gelu_tanh", `torch.nn.functional.gelu(gate, approximate="tanh")`. Each may be
    columns of a wider array; they are copied if rows are not equally far apart. ValueError if they do not fit."""
    name = pick("gated_mul", impl, gate.device, FORWARD)
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.ndim or not gate.dtype.is_floating_point:
        raise ValueError(
            f"gated_mul: gate and up must be (..., D) of one floating dtype, got {tuple(gate.shape)} in {gate.dtype} "
            f"and {tuple(up.shape)} in {up.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_mul: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if gate.dtype == torch.float64:
        raise ValueError("gated_mul: float64 is not served; use float32")
    return FORWARD[name](gate, up, activation)  # type: ignore[no-any-return]
