"""A rollout's forwards on our own kernels, on a CPU in float32 or bfloat16, while the phase lasts: every nn.Linear of
the trunk, and the head, by packed_linear on weights packed once; SwiGLU blocks with gate and up as one product; every
RMS norm by rms_norm. Only where the weights are few enough to be held twice; larger matrices are multiplied as well by
the general GEMM, beside which the rest costs nothing.

Families name and write their norms and blocks each in its own way, so a module's answer to a probe decides whether it
computes what we would put in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from ppomax_kernels.internal.packed_linear import DTYPES, pack, packed_linear
from ppomax_kernels.internal.packed_linear import packed_bytes as bytes_of
from ppomax_kernels.internal.rms_norm import rms_norm
from ppomax_kernels.internal.silu_mul import silu_mul
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.models import base_of, head_of

MOST_BYTES = 256 * 2**20
"""Weights that are packed: above this they are not worth a second copy."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Between a module's answer to the probe and ours; bfloat16 keeps 8 bits, and modules round more than once."""

Run = Callable[[Tensor], Tensor]


def packed_layers(model: PreTrainedModel, attention: str) -> list[nn.Linear]:
    """The trunk's linear layers that a rollout packs; none unless all of it, the head included, fits and runs on our
    kernels. The planner asks this too, of a model without weights."""
    if attention != "native" or model.dtype not in DTYPES:
        return []
    found = [m for m in base_of(model).modules() if type(m) is nn.Linear and m.weight.dtype == model.dtype]
    weights = [m.weight for m in found] + [head_of(model).weight]
    even = model.dtype == torch.float32 or all(w.shape[1] % 2 == 0 for w in weights)
    return found if even and sum(w.nbytes for w in weights) <= MOST_BYTES else []


def packed_bytes(model: PreTrainedModel, attention: str) -> int:
    """Bytes of the packed copies."""
    layers = packed_layers(model, attention)
    return sum(bytes_of(m.weight) for m in layers) + (bytes_of(head_of(model).weight) if layers else 0)


@contextmanager
def packed_trunk(model: PreTrainedModel, attention: str) -> Iterator[Tensor | None]:
    """Inside, the trunk runs on our kernels, linear layers, norms and SwiGLU blocks; gives the head's panels, or None
    if nothing is packed."""
    layers = set(packed_layers(model, attention))
    runs: dict[nn.Module, Run] = {}
    if layers:
        modules = list(base_of(model).modules())
        runs |= {m: run for m in modules if (run := norm_of(m)) is not None}
        for block in modules:
            if (inside := swiglu_layers(block, layers)) is not None:
                runs[block] = _swiglu(*inside)
                layers -= set(inside)
        runs |= {m: _linear(m) for m in layers}
    try:
        for module, run in runs.items():
            module.forward = run  # type: ignore[method-assign]
        yield pack(head_of(model).weight) if runs else None
    finally:
        for module in runs:
            module.__dict__.pop("forward", None)


def norm_of(module: nn.Module) -> Run | None:
    """rms_norm with the module's weight, if that is what the module computes; None for every other module."""
    weight = getattr(module, "weight", None)
    eps = next((e for n in ("variance_epsilon", "eps") if isinstance(e := getattr(module, n, None), float)), None)
    if "RMSNorm" not in type(module).__name__ or weight is None or eps is None or weight.dtype not in TOLERANCE:
        return None
    weight = weight.detach()
    for offset in (0.0, 1.0):
        run = partial(rms_norm, weight=weight, offset=offset, eps=eps)
        if _same(module, run, len(weight), weight.dtype):
            return run
    return None


def swiglu_layers(block: nn.Module, layers: set[nn.Linear]) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    """Gate, up and down of a block that is `down(silu(gate(x)) * up(x))`, gate and up without bias; None for every
    other module."""
    gate, up, down = (getattr(block, f"{n}_proj", None) for n in ("gate", "up", "down"))
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
        return None
    if not {gate, up, down} <= layers or gate.bias is not None or up.bias is not None:
        return None

    def plain(x: Tensor) -> Tensor:
        return down(silu_mul(torch.cat([gate(x), up(x)], -1)))  # type: ignore[no-any-return]

    return (gate, up, down) if _same(block, plain, gate.in_features, gate.weight.dtype) else None


def _same(module: nn.Module, run: Run, width: int, dtype: torch.dtype) -> bool:
    probe = torch.linspace(-2.0, 3.0, 2 * width).view(2, -1).to(dtype)
    limit = TOLERANCE[dtype]
    with torch.no_grad():
        want = module(probe)
        return torch.allclose(run(probe), want, rtol=limit, atol=limit * float(want.abs().max()))


def _linear(layer: nn.Linear) -> Run:
    return partial(packed_linear, panels=pack(layer.weight), bias=layer.bias, outputs=layer.out_features)


def _swiglu(gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> Run:
    both, last = torch.cat([gate.weight.detach(), up.weight.detach()]), _linear(down)
    first = partial(packed_linear, panels=pack(both), bias=None, outputs=len(both))
    return lambda x: last(silu_mul(first(x)))
