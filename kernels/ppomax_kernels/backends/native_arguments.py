"""Tensors as arguments of the C ABI."""

from torch import Tensor, contiguous_format, empty_like, float32

from .. import checks
from .abi import DTYPES


def new_like(like: Tensor) -> Tensor:
    """An fp32 result of the shape of `like`: half the cost of torch.empty(like.shape), which parses the shape."""
    return empty_like(like, dtype=float32, memory_format=contiguous_format)


def at(x: Tensor | None) -> int | None:
    """Where an optional argument lies; None: it is not given. ValueError for one whose storage was freed, which has no
    address either and must not pass for one that was left out."""
    if x is None:
        return None
    address = x.data_ptr()
    if not address:
        checks.stored("ppomax", x)
    return address


def array(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (at(x), DTYPES[x.dtype])


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
