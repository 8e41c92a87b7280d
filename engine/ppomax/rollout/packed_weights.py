"""A rollout's forwards on our own kernels, on a CPU in float32 or bfloat16, while the phase lasts: every nn.Linear of
the trunk, and the head, by packed_linear on weights packed once, those that read the same input joined; norms, SwiGLU
blocks and rotary embeddings as in models/fused_trunk.py. Only where the weights are few enough to be held twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ppomax_kernels.internal.packed_linear import DTYPES, Packed, pack
from ppomax_kernels.internal.packed_linear import packed_bytes as bytes_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.models import base_of, blocks_of, head_of
from ppomax.models.fused_trunk import Run, all_runs, fused_rotary, in_place
from ppomax.rollout.attention import Attention
from ppomax.rollout.lean_blocks import lean_blocks

MOST_BYTES = 2 * 2**30
"""Weights above this are not packed: the second copy would take more of a machine's memory than its rollouts save in
time. Below, decoding some rows at a time is bound by products that packing makes two to three times as fast."""


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
def packed_trunk(model: PreTrainedModel, attention: Attention) -> Iterator[Tensor | None]:
    """Inside, the trunk runs on our kernels; gives the head's panels, or None if nothing is packed."""
    runs: dict[nn.Module, Run] = {}
    if packed_layers(model, attention.name):
        packed: dict[tuple[nn.Linear, ...], Packed] = {}

        def join(layers: list[nn.Linear]) -> Packed:
            key = tuple(layers)
            if key not in packed:
                packed[key] = _packed(layers)
            return packed[key]

        with torch.no_grad():
            runs = all_runs(base_of(model), join)
            runs |= lean_blocks(list(blocks_of(model)), join, attention)
    with in_place(runs), fused_rotary(runs):
        yield pack(head_of(model).weight) if runs else None


def _packed(layers: list[nn.Linear]) -> Packed:
    """One product on the layers' weights side by side, packed here."""
    first = layers[0]
    if len(layers) == 1:
        return Packed(pack(first.weight), first.bias, first.out_features)
    weight = torch.cat([m.weight.detach() for m in layers])
    bias = None if first.bias is None else torch.cat([m.bias.detach() for m in layers])
    return Packed(pack(weight), bias, len(weight))
