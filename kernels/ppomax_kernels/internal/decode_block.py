"""One decoder block of a rollout on a CPU in one call: norm, query, key and value, rotary embedding, paged attention,
its output, norm, SwiGLU and both residual sums, by the kernels that these have one by one and to the same bits. Between
them a caller in Python spends as long as a fifth of a step of a small model. Internal to the engine's rollout: no
gradient, and written for tensors that it made itself."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import late
from .packed_linear import PANEL, Packed
from .rms_norm import NormTerms

_run = late("backends.native_internal", "decode_block_cpu")


class Parts(NamedTuple):
    """What a block is made of, all in float32 or all in bfloat16."""

    before_attention: NormTerms
    before_mlp: NormTerms
    of_heads: tuple[NormTerms, NormTerms] | None
    """Of query and key."""
    qkv: Packed
    """Queries, then keys, then values."""
    out: Packed
    gate_up: Packed
    down: Packed


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("offset", ctypes.c_double), ("eps", ctypes.c_double))


class _Panels(ctypes.Structure):
    _fields_ = (("panels", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Block(ctypes.Structure):
    """ppomax_block."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "dim", "inner")),
        *((name, _Norm) for name in ("before_attention", "before_mlp", "of_query", "of_key")),
        *((name, _Panels) for name in ("qkv", "out", "gate_up", "down")),
    )


class DecodeBlock:
    """A block with its weights; they must not move while it is used."""

    def __init__(self, parts: Parts, heads: int, kv_heads: int, dim: int):
        """ValueError for parts that do not fit together."""
        hidden, inner, dtype = parts.out.outputs, parts.gate_up.outputs // 2, parts.before_attention.weight.dtype
        norms = (parts.before_attention, parts.before_mlp, *(parts.of_heads or ()))
        inputs = {"qkv": hidden, "out": heads * dim, "gate_up": hidden, "down": inner}
        outputs = {"qkv": (heads + 2 * kv_heads) * dim, "out": hidden, "gate_up": 2 * inner, "down": hidden}
        for name, given in inputs.items():
            packed: Packed = getattr(parts, name)
            panels, bias, found = packed.panels, packed.bias, packed.outputs
            inside = (given, PANEL) if dtype == torch.float32 else (given // 2, PANEL, 2)
            if found != outputs[name] or panels.shape[1:] != inside or panels.dtype != dtype:
                raise ValueError(
                    f"decode_block: {name} must be a packed {dtype} weight ({outputs[name]}, {given}), got panels "
                    f"{tuple(panels.shape)} in {panels.dtype} of {found} outputs"
                )
            if bias is not None and (bias.shape != (found,) or bias.dtype != dtype):
                raise ValueError(f"decode_block: {name}'s bias must be {dtype} ({found},), got {tuple(bias.shape)}")
        for norm, width in zip(norms, (hidden, hidden, dim, dim)[: len(norms)], strict=True):
            if norm.weight.shape != (width,) or norm.weight.dtype != dtype:
                raise ValueError(
                    f"decode_block: a norm's weight must be {dtype} ({width},), got {tuple(norm.weight.shape)} in "
                    f"{norm.weight.dtype}"
                )
        self.parts, self.hidden = parts, hidden  # kept: the structure holds addresses alone
        self.block = _Block(hidden, heads, kv_heads, dim, inner)
        names = ("before_attention", "before_mlp", "of_query", "of_key")
        for name, norm in zip(names, norms, strict=False):
            setattr(self.block, name, _Norm(norm.weight.data_ptr(), norm.offset, norm.eps))
        for name in inputs:
            packed = getattr(parts, name)
            offset = None if packed.bias is None else packed.bias.data_ptr()
            setattr(self.block, name, _Panels(packed.panels.data_ptr(), offset))

    def __call__(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        pages: Sequence[Tensor],
        where: tuple[Tensor, Tensor, Tensor],
        terms: tuple[float, int, float],
    ) -> Tensor:
        """x (N, hidden), angles: cosine and sine (N, dim), in the weights' dtype and contiguous -> (N, hidden). pages,
        where and terms: key and value pages; tables, sequences and positions; scale, window and softcap, as
        paged_attention takes them. ValueError for a page, sequence or position outside the arrays."""
        return _run(self.block, x, angles, pages, where, terms)  # type: ignore[no-any-return]
