"""y = x W^T + b on a CPU for the tens to hundreds of rows that decoding has, with weights packed once for many calls:
panels of PANEL output columns, each [input][column], which stay in the first cache while the rows pass. A general GEMM
packs the weights anew in every call: 5 to 20 % of the time at 64 rows. In bfloat16 two inputs lie side by side in each
column, as the processors that multiply such pairs want them; sums are float32. A row's result does not depend on the
other rows, to the bit. Internal to the engine's rollout: no gradient; the packed copy goes stale when the weight
changes."""

import torch
from torch import Tensor

from ..dispatch import late

PANEL = 32
DTYPES = (torch.float32, torch.bfloat16)
_run, _pack = late("backends.native_internal", "packed_linear_cpu"), late("backends.native_internal", "pack_linear_cpu")


def panel_count(outputs: int) -> int:
    """Panels of a weight with so many outputs: `ceil(outputs / PANEL)`."""
    return -(-outputs // PANEL)


def packed_bytes(weight: Tensor) -> int:
    """`pack(weight).nbytes`, without packing; the weight may be on any device."""
    outputs, inputs = weight.shape
    return panel_count(outputs) * PANEL * inputs * weight.dtype.itemsize


def pack(weight: Tensor) -> Tensor:
    """(out, in) on a CPU -> (ceil(out / PANEL), in, PANEL) in float32, (ceil(out / PANEL), in / 2, PANEL, 2) in
    bfloat16, zeros in columns that do not exist. ValueError for another weight."""
    half = weight.dtype == torch.bfloat16
    if weight.ndim != 2 or not weight.numel() or weight.dtype not in DTYPES or not weight.is_cpu:
        raise ValueError(
            f"packed_linear: weight must be (out, in) in float32 or bfloat16 on the CPU and not empty, got "
            f"{tuple(weight.shape)} in {weight.dtype} on {weight.device}"
        )
    outputs, inputs = weight.shape
    if half and inputs % 2:
        raise ValueError(f"packed_linear: a bfloat16 weight must have an even number of inputs, got {inputs}")
    count = panel_count(outputs)
    shape = (count, inputs // 2, PANEL, 2) if half else (count, inputs, PANEL)
    return _pack(weight.detach().contiguous(), weight.new_empty(shape))  # type: ignore[no-any-return]


def packed_linear(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """`torch.nn.functional.linear(x, weight, bias)` for x (..., in) in float32 or bfloat16 on a CPU, `panels` =
    pack(weight) and `outputs` = weight.shape[0]. x is copied if it is not contiguous. ValueError if they do not fit
    together."""
    inputs = panels.shape[1] * (2 if panels.ndim == 4 else 1)
    if x.shape[-1] != inputs or panels.shape[2] != PANEL or not 0 <= len(panels) * PANEL - outputs < PANEL:
        raise ValueError(
            f"packed_linear: x {tuple(x.shape)} and {outputs} outputs do not fit panels {tuple(panels.shape)}; make "
            "them by pack(weight)"
        )
    if not (x.dtype == panels.dtype in DTYPES and x.is_cpu and panels.is_cpu and panels.is_contiguous()):
        raise ValueError(
            "packed_linear: x and panels must be of one dtype, float32 or bfloat16, on the CPU, got "
            f"{x.dtype} and {panels.dtype}"
        )
    if bias is not None and (bias.shape != (outputs,) or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise ValueError(
            f"packed_linear: bias must be {x.dtype} of shape ({outputs},), got {bias.dtype} {tuple(bias.shape)}"
        )
    return _run(x if x.is_contiguous() else x.contiguous(), panels, bias, outputs)  # type: ignore[no-any-return]
