"""A rollout's forwards on our own kernels, on a CPU in float32, while the phase lasts: every nn.Linear of the trunk,
and the head, by packed_linear on weights packed once; every RMS norm by rms_norm. Only where the weights are few enough
to be held twice; larger matrices are multiplied as well by the general GEMM, beside which the norms cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from ppomax_kernels.packed_linear import pack, packed_linear
from ppomax_kernels.rms_norm import rms_norm
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.models import base_of, head_of

MOST_BYTES = 256 * 2**20
"""Weights that are packed: above this they are not worth a second copy."""
NORM_TOLERANCE = 1e-5


def packable(model: PreTrainedModel, attention: str) -> dict[str, nn.Linear]:
    """The trunk's linear layers that a rollout packs, by name; none unless all of it fits and runs on our kernels."""
    if attention != "native" or model.dtype != torch.float32:
        return {}
    found = {n: m for n, m in base_of(model).named_modules() if type(m) is nn.Linear and m.weight.dtype == model.dtype}
    return found if sum(m.weight.nbytes for m in found.values()) + head_of(model).weight.nbytes <= MOST_BYTES else {}


def packed_bytes(model: PreTrainedModel, attention: str) -> int:
    """Bytes of the packed copies."""
    layers = packable(model, attention).values()
    return sum(m.weight.nbytes for m in layers) + (head_of(model).weight.nbytes if layers else 0)


@contextmanager
def packed_linears(model: PreTrainedModel, attention: str) -> Iterator[Tensor | None]:
    """Inside, those layers run on packed weights, and the norms on rms_norm; gives the head's panels, or None if
    nothing is packed."""
    layers = packable(model, attention)
    runs: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for layer in layers.values():
        runs[layer] = partial(packed_linear, panels=pack(layer.weight), bias=layer.bias, outputs=layer.out_features)
    if layers:
        runs |= {m: run for m in base_of(model).modules() if (run := norm_of(m)) is not None}
    try:
        for module, run in runs.items():
            module.forward = run  # type: ignore[method-assign]
        yield pack(head_of(model).weight) if layers else None
    finally:
        for module in runs:
            module.__dict__.pop("forward", None)


def norm_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """rms_norm with the module's weight, if that is what the module computes: families name and offset their norms
    each in its own way, so its answer to a probe decides. None for every other module."""
    weight = getattr(module, "weight", None)
    eps = next((e for n in ("variance_epsilon", "eps") if isinstance(e := getattr(module, n, None), float)), None)
    if "RMSNorm" not in type(module).__name__ or weight is None or eps is None or weight.dtype != torch.float32:
        return None
    weight = weight.detach()
    probe = torch.linspace(-2.0, 3.0, 2 * len(weight)).view(2, -1)
    want = module(probe)
    for offset in (0.0, 1.0):
        if torch.allclose(rms_norm(probe, weight, offset=offset, eps=eps), want, NORM_TOLERANCE, NORM_TOLERANCE):
            return partial(rms_norm, weight=weight, offset=offset, eps=eps)
    return None
