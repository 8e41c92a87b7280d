"""What memory safety needs of the arguments of a registered op, whatever back-end runs it. Callers of torch.ops.ppomax
come past the public functions, which have checked all of this in better words. Called where an op begins to compute, so
there is no tracing here."""

import torch
from torch import Tensor

from .dispatch import RUNS_ON, triton_interprets
from .terms import LinearInputs


def place(op: str, impl: str, like: Tensor, *others: Tensor | None) -> None:
    """All on one device, which the back-end runs on."""
    kind = like.device.type
    if impl == "ref":
        good = kind != "meta"
    else:
        good = kind == RUNS_ON.get(impl) or (impl == "triton" and kind == "cpu" and triton_interprets())
    if not good:
        raise ValueError(f"{op}: impl={impl!r} does not run on {like.device}")
    for x in others:
        if x is not None and x.device != like.device:
            raise ValueError(f"{op}: tensors must be on one device, got {like.device} and {x.device}")


def alike(op: str, like: Tensor, *others: Tensor | None) -> None:
    """Contiguous arrays of one shape."""
    for x in (like, *others):
        if x is not None and (x.shape != like.shape or not x.is_contiguous()):
            raise ValueError(
                f"{op}: tensors must be contiguous and of one shape {tuple(like.shape)}, got one of shape "
                f"{tuple(x.shape)}, strides {tuple(x.stride())}"
            )


def typed(op: str, wanted: torch.dtype, *given: Tensor | None) -> None:
    """Of a type that kernels take for granted."""
    for x in given:
        if x is not None and x.dtype != wanted:
            raise ValueError(f"{op}: {wanted} is wanted, got {x.dtype} of shape {tuple(x.shape)}")


def mask(op: str, x: Tensor | None) -> None:
    """One byte a token."""
    if x is not None and x.dtype.itemsize != 1:
        raise ValueError(f"{op}: mask must be bool or uint8, got {x.dtype}")


def number(op: str, x: Tensor | None) -> None:
    """A single float32."""
    typed(op, torch.float32, x)
    if x is not None and x.numel() != 1:
        raise ValueError(f"{op}: normalizer must be one number, got shape {tuple(x.shape)}")


def each(op: str, count: int, *given: Tensor | None) -> None:
    """One number for each of `count` things."""
    for x in given:
        if x is not None and (x.shape != (count,) or not x.is_contiguous()):
            raise ValueError(f"{op}: shape ({count},), contiguous, is wanted, got {tuple(x.shape)}")


def sequences(op: str, cu_seqlens: Tensor) -> int:
    """How many sequences `cu_seqlens` tells of."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not cu_seqlens.is_contiguous():
        raise ValueError(f"{op}: cu_seqlens must be int32 of shape (S+1,), contiguous")
    if not cu_seqlens.numel():
        raise ValueError(f"{op}: cu_seqlens must have at least one entry, 0")
    return cu_seqlens.numel() - 1


def rows(op: str, logits: Tensor, labels: Tensor) -> None:
    """A label for each row of logits."""
    if logits.ndim < 1 or labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{op}: labels must be int64 of shape {tuple(logits.shape[:-1])}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if logits.stride()[-1] != 1 and logits.shape[-1] > 1:
        raise ValueError(f"{op}: the last dimension of logits must be contiguous, got strides {logits.stride()}")


def linear(op: str, impl: str, inputs: LinearInputs) -> None:
    """hidden (N, D), weight (V, D), labels (N,), bias (V,)."""
    hidden, weight, labels, bias = inputs
    place(op, impl, hidden, weight, labels, bias)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{op}: hidden (N, D) and weight (V, D) are wanted, got {shapes}")
    each(op, len(hidden), labels)
    each(op, len(weight), bias)
    typed(op, torch.int64, labels)
    typed(op, hidden.dtype, weight, bias)
