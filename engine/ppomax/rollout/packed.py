"""Weights packed once for a rollout on a CPU in float32: every nn.Linear of the trunk, and the head, run by
ppomax_kernels.packed_linear while the phase lasts. Only where the weights are few enough to be held twice; larger
matrices are multiplied as well by the general GEMM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from ppomax_kernels.packed_linear import pack, packed_linear
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.models import base_of, head_of

MOST_BYTES = 256 * 2**20
"""Weights that are packed: above this they are not worth a second copy."""


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
    """Inside, those layers run on packed weights; gives the head's panels, or None if nothing is packed."""
    layers = packable(model, attention)
    try:
        for layer in layers.values():
            run = partial(packed_linear, panels=pack(layer.weight), bias=layer.bias, outputs=layer.out_features)
            layer.forward = run  # type: ignore[method-assign]
        yield pack(head_of(model).weight) if layers else None
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)
