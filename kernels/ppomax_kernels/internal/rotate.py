"""Rotary position embedding in one pass, where eager torch takes two halves, a negation, a concatenation, two
products and a sum: `rotate` on a CPU, `rotate_pair` on a GPU. Internal to the engine."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Table, late, pick

PAIR: Table = {"triton": late("internal.rotate_triton", "rotate_triton")}
_run = late("backends.native_internal", "rotate_cpu")


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`x * cosine + cat([-x[..., D/2:], x[..., :D/2]], -1) * sine` for x (B, H, T, D) and cosine, sine (B or 1, T, D),
    seen as (B or 1, 1, T, D), in float32 on a CPU; differentiable in x. The result lies in memory as (B, T, H, D).
    x is copied if its last dimension is not contiguous. ValueError if they do not fit."""
    fits = x.ndim == 4 and cosine.ndim == 3 and cosine.shape == sine.shape and cosine.shape[1:] == x.shape[2:]
    if not fits or cosine.shape[0] not in (1, x.shape[0]) or x.shape[3] % 2 or not x.shape[3]:
        raise ValueError(
            "rotate: x must be (B, H, T, D) with an even D, cosine and sine (B or 1, T, D), got "
            f"{tuple(x.shape)}, {tuple(cosine.shape)} and {tuple(sine.shape)}"
        )
    here = all(t.is_cpu or t.is_meta for t in (x, cosine, sine))
    if not (here and x.dtype == cosine.dtype == sine.dtype == torch.float32):
        raise ValueError(f"rotate: float32 on the CPU is wanted, got {x.dtype} and {cosine.dtype} on {x.device}")
    x = x if x.stride(3) == 1 else x.contiguous()
    if not (cosine.is_contiguous() and sine.is_contiguous()):
        cosine, sine = cosine.contiguous(), sine.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cosine, sine)  # type: ignore[no-any-return,no-untyped-call]
    return _run(x, cosine, sine, False)  # type: ignore[no-any-return]


def rotate_pair(
    query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`rotate` of query (B, H, T, D) and key (B, G, T, D) on a GPU, in one launch; no gradient. In float32, bfloat16 or
    float16, computed in float32 and rounded once. ValueError if they do not fit."""
    name = pick("rotate_pair", impl, query.device, PAIR)
    batch, _, tokens, dim = query.shape
    fits = key.ndim == 4 and (key.shape[0], *key.shape[2:]) == (batch, tokens, dim) and cosine.shape == sine.shape
    if not fits or cosine.shape not in ((1, tokens, dim), (batch, tokens, dim)) or dim % 2 or not dim:
        raise ValueError(
            "rotate_pair: query must be (B, H, T, D) and key (B, G, T, D) with an even D, cosine and sine (B or 1, T, "
            f"D), got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(cosine.shape)} and {tuple(sine.shape)}"
        )
    if not (query.dtype == key.dtype == cosine.dtype == sine.dtype):
        raise ValueError(f"rotate_pair: one dtype is wanted, got {query.dtype}, {key.dtype} and {cosine.dtype}")
    return PAIR[name](query, key, cosine.contiguous(), sine.contiguous())  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cosine, sine)
        return _run(x, cosine, sine, False)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        return _run(dy, cosine, sine, True), None, None
