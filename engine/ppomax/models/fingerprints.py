"""Which models and data a checkpoint belongs to, without storing what is frozen or read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy
import torch
from torch import Tensor, nn

from ppomax.models.frozen_bits import FrozenLinear
from ppomax.models.partitioned import gathered

CHUNK = 1 << 12
"""Values of a tensor that one sum stands for."""
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(
    policy: nn.Module, critic: nn.Module, reference: nn.Module | None, reward_model: nn.Module | None
) -> dict[str, str | None]:
    """Shapes of what is trained; shapes and all weights of what is frozen. The same for models that are cut over
    ranks."""
    models = {"policy": policy, "critic": critic, "reference": reference, "reward model": reward_model}
    return {role: None if model is None else fingerprint(model) for role, model in models.items()}


def fingerprint(model: nn.Module) -> str:
    """Hash of the class, the parameters' names, shapes and types, and the bits of every frozen one."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(getattr(p, 'ds_shape', p.shape))} {p.dtype};".encode())
        if not p.requires_grad:
            with gathered(p):
                digest.update(chunk_sums(p.detach()).cpu().numpy().tobytes())
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear):
            digest.update(f"{name} {layer.bits} bits of {layer.dtype};".encode())
            for x in (layer.codes, layer.scales):
                digest.update(chunk_sums(x).cpu().numpy().tobytes())
    return digest.hexdigest()


def chunk_sums(x: Tensor) -> Tensor:
    """int64 sums of the bits of `x`, read as whole numbers, over every CHUNK of its values: where `x` lies, and with no
    copy of it. One weight that differs in one bit gives another sum."""
    bits = x.flatten().view(WHOLE[x.element_size()])
    whole = len(bits) // CHUNK * CHUNK
    sums = [bits[:whole].view(-1, CHUNK).sum(1, dtype=torch.int64), bits[whole:].sum(dtype=torch.int64)[None]]
    return torch.cat(sums)


def fingerprint_rows(rows: Iterable[Sequence[int]]) -> str:
    """Hash of token ids, row by row, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(numpy.asarray(row, dtype=numpy.int64).tobytes())
    return digest.hexdigest()
