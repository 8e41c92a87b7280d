"""y = x W^T + b on a CPU, with W packed: panels of PANEL output columns, each [input][column], which stay in the near
caches while the rows pass. Sums go on from one input to the next in float32, so a row's result does not depend on the
other rows, to the bit, nor on threads. For weights packed once for many calls, as decoding has them; `product` packs
what it is given. In bfloat16 two inputs lie side by side in each column, as the processors that multiply such pairs
want them. Internal to the engine and the linear ops: no gradient (linear.py has); panels go stale when the weight
changes."""

from dataclasses import dataclass

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
    if weight.ndim != 2 or not weight.numel() or weight.dtype not in DTYPES or weight.is_cuda:
        raise ValueError(
            f"packed_linear: weight must be (out, in) in float32 or bfloat16 on the CPU and not empty, got "
            f"{tuple(weight.shape)} in {weight.dtype} on {weight.device}"
        )
    outputs, inputs = weight.shape
    if half and inputs % 2:
        raise ValueError(f"packed_linear: a bfloat16 weight must have an even number of inputs, got {inputs}")
    count = panel_count(outputs)
    shape = (count, inputs // 2, PANEL, 2) if half else (count, inputs, PANEL)
    return _pack(_strided(weight.detach()), weight.new_empty(shape))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Packed:
    """A weight that was packed once, as a function: `torch.nn.functional.linear(x, weight, bias)`."""

    panels: Tensor
    bias: Tensor | None
    outputs: int

    def __call__(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.panels, self.bias, self.outputs)


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
    rows = (x if x.is_contiguous() else x.contiguous()).view(-1, inputs)
    y = x.new_empty(*x.shape[:-1], outputs)
    _run(rows, panels, bias, y.view(-1, outputs), False)
    return y


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """`x @ weight.T + bias` (N, out), or with `add` that and what `out` holds: x (N, D), weight (out, D), bias (out,)
    or None, in float32 on a CPU, and `out` contiguous. x and weight may be transposed views, of which no copy is made;
    any other view is copied."""
    y = x.new_empty(len(x), len(weight)) if out is None else out
    if not x.shape[1] or not y.numel():
        return y if add else y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    return _run(_strided(x), pack(weight), bias, y, add)  # type: ignore[no-any-return]


def serves(*xs: Tensor | None) -> bool:
    """Whether `product` takes them, by where they are and their dtype."""
    return all(x is None or (x.dtype == torch.float32 and x.is_cpu) for x in xs)


def _strided(x: Tensor) -> Tensor:
    """x, or a contiguous copy unless its rows or (in float32) its columns lie side by side."""
    rows, columns = x.stride()
    return x if columns == 1 or (rows == 1 and x.dtype == torch.float32) else x.contiguous()
