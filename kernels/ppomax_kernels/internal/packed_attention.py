"""Causal attention within packed sequences on a CPU, differentiable: a block of queries against all keys that it sees
as one product, which adds in the order of the rollout's paged_attention, so that a token's result is the same to the
bit when it is decoded, scored or trained on, whatever stands beside it. Nothing is padded. Internal to the engine."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import late
from ..library import first_derivative

_forward = late("backends.native_internal", "packed_attention_cpu")
_backward = late("backends.native_internal", "packed_attention_backward_cpu")


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, window: int) -> Tensor:
        ctx.save_for_backward(query, key, value, ends)
        ctx.scale, ctx.window = scale, window
        return _forward(query, key, value, ends, scale, window)  # type: ignore[no-any-return]

    @staticmethod
    @first_derivative
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(*ctx.saved_tensors, ctx.scale, ctx.window, dout), None, None, None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *, scale: float, window: int = 0
) -> Tensor:
    """`softmax(scale * query @ keys.T) @ values` (N, H, Dv) for each token over those of its own sequence up to itself,
    the last `window` of them (0: all): query (N, H, D), key (N, G, D) and value (N, G, Dv) in float32 on a CPU, the
    last dimension contiguous, H a multiple of G; ends (S+1,) int32, where each sequence starts and the last ends. Once
    differentiable. ValueError for arrays that do not fit together, RuntimeError for ends that do not rise from 0 to
    N."""
    parts = {"query": query, "key": key, "value": value}
    for name, x in parts.items():
        if x.dtype != torch.float32 or not x.is_cpu or x.ndim != 3 or (x.stride(2) != 1 and x.shape[2] > 1):
            raise ValueError(
                f"packed_attention: {name} must be (tokens, heads, dim) in float32 on a CPU, its last dimension "
                f"contiguous, got {tuple(x.shape)} of strides {x.stride()} in {x.dtype} on {x.device}"
            )
    if not len(query) == len(key) == len(value) or query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        raise ValueError(
            "packed_attention: query, key and value must have as many tokens, and a multiple of the key heads as "
            f"query heads, got {', '.join(f'{name} {tuple(x.shape)}' for name, x in parts.items())}"
        )
    if query.shape[2] != key.shape[2] or ends.dtype != torch.int32 or not ends.is_cpu or not ends.is_contiguous():
        raise ValueError(
            f"packed_attention: query and key must be as wide as each other, got {query.shape[2]} and {key.shape[2]}; "
            f"ends must be int32 on the CPU, got {ends.dtype} on {ends.device}"
        )
    return _PackedAttention.apply(query, key, value, ends, scale, window)  # type: ignore[no-any-return, no-untyped-call]
