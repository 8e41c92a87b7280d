"""y = x W^T + b in float32 on a CPU for the tens to hundreds of rows that decoding has, with weights packed once for
many calls: panels of PANEL output columns, each [input][column], which stay in the first cache while the rows pass.
A general GEMM packs the weights anew in every call: 5 to 20 % of the time at 64 rows. A row's result does not depend on
the other rows, to the bit. Internal to the engine's rollout: no gradient; the packed copy goes stale when the weight
changes."""

import torch
from torch import Tensor

from .dispatch import late

PANEL = 32
_run, _pack = late("native", "packed_linear_cpu"), late("native", "pack_linear_cpu")


def pack(weight: Tensor) -> Tensor:
    """(out, in) float32 on a CPU -> (ceil(out / PANEL), in, PANEL), zeros in columns that do not exist. ValueError for
    another weight."""
    if weight.ndim != 2 or not weight.numel() or weight.dtype != torch.float32 or not weight.is_cpu:
        raise ValueError(
            f"packed_linear: weight must be (out, in) in float32 on the CPU and not empty, got {tuple(weight.shape)} "
            f"in {weight.dtype} on {weight.device}"
        )
    return _pack(weight.detach().contiguous(), PANEL)  # type: ignore[no-any-return]


def packed_linear(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """`torch.nn.functional.linear(x, weight, bias)` for x (..., in) float32 on a CPU, `panels` = pack(weight) and
    `outputs` = weight.shape[0]. x is copied if it is not contiguous. ValueError if they do not fit together."""
    count, inputs, width = panels.shape
    if x.shape[-1] != inputs or width != PANEL or not (count - 1) * PANEL < outputs <= count * PANEL:
        raise ValueError(
            f"packed_linear: x {tuple(x.shape)} and {outputs} outputs do not fit panels {tuple(panels.shape)}; make "
            "them by pack(weight)"
        )
    if not (x.dtype == panels.dtype == torch.float32 and x.is_cpu and panels.is_cpu and panels.is_contiguous()):
        raise ValueError(f"packed_linear: x and panels must be float32 on the CPU, got {x.dtype} and {panels.dtype}")
    if bias is not None and (bias.shape != (outputs,) or bias.dtype != torch.float32 or not bias.is_contiguous()):
        raise ValueError(f"packed_linear: bias must be float32 of shape ({outputs},), got {tuple(bias.shape)}")
    return _run(x if x.is_contiguous() else x.contiguous(), panels, bias, outputs)  # type: ignore[no-any-return]
