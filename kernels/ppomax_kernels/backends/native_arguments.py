"""Tensors as arguments of the C ABI, and the checks that memory safety needs, for callers of the raw torch ops: the
public functions have checked all of it before."""

import torch
from torch import Tensor, contiguous_format, empty_like, float32

from .. import checks
from .abi import DTYPES


def new_like(like: Tensor) -> Tensor:
    """An fp32 result of the shape of `like`: half the cost of torch.empty(like.shape), which parses the shape."""
    return empty_like(like, dtype=float32, memory_format=contiguous_format)


def array(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), DTYPES[x.dtype])


def match(op: str, like: Tensor, *others: Tensor | None) -> None:
    """What memory safety needs, for callers of the raw torch ops: arrays of one size, in order, on the CPU."""
    for x in (like, *others):
        if x is not None and (x.shape != like.shape or not x.is_contiguous() or not x.is_cpu):
            raise ValueError(
                f"{op}: tensors must be contiguous, on the CPU and of one shape {tuple(like.shape)}, got one of shape "
                f"{tuple(x.shape)}, strides {tuple(x.stride())}, on {x.device}"
            )


def match_rows(op: str, logits: Tensor, labels: Tensor) -> None:
    if labels.shape != logits.shape[:-1] or labels.dtype != torch.int64 or not (logits.is_cpu and labels.is_cpu):
        raise ValueError(
            f"{op}: labels must be int64 of shape {tuple(logits.shape[:-1])} on the CPU, got {labels.dtype} of shape "
            f"{tuple(labels.shape)} on {labels.device}"
        )
    if logits.stride()[-1] != 1 and logits.shape[-1] > 1:
        raise ValueError(f"{op}: the last dimension of logits must be contiguous, got strides {logits.stride()}")


def match_sequences(op: str, cu_seqlens: Tensor, *each: Tensor | None) -> None:
    if (
        cu_seqlens.dtype != torch.int32
        or cu_seqlens.ndim != 1
        or not cu_seqlens.is_contiguous()
        or not cu_seqlens.is_cpu
    ):
        raise ValueError(f"{op}: cu_seqlens must be int32 of shape (S+1,), contiguous, on the CPU")
    if any(x is not None and x.numel() != cu_seqlens.numel() - 1 for x in each):
        raise ValueError(f"{op}: there must be one number for each of the {cu_seqlens.numel() - 1} sequences")


def at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def upstream(op: str, name: str, x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A gradient of one number a row, and its two strides. One that two strides cannot walk is copied: it is small
    beside the logits."""
    if x is None:
        return None, 0, 0
    try:
        return x, *checks.rows(op, name, x.shape, x.stride())[2:]
    except ValueError:
        x = x.contiguous()
        return x, *checks.rows(op, name, x.shape, x.stride())[2:]
