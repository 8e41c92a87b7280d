"""The ops of the engine's rollout on CPUs, by the compiled library."""

from collections.abc import Sequence
from ctypes import Structure, byref
from typing import Any

from torch import Tensor, empty, empty_like, get_num_threads

from .abi import BAD_PAGE, DTYPES, library, refuse
from .native_arguments import at

GRADIENT_ROWS = 64
"""PPOMAX_GRADIENT_ROWS."""


def paged_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    op = "paged_attention"
    tokens, heads, dim = query.shape
    _, kv_heads, value_dim = value.shape
    q, k, v = query.stride(), key.stride(), value.stride()
    if ((q[2] != 1 or k[2] != 1) and dim > 1) or (v[2] != 1 and value_dim > 1):
        raise ValueError(f"{op}: the last dimension of query, key and value must be contiguous, got {q}, {k}, {v}")
    if not (key_pages.is_contiguous() and value_pages.is_contiguous() and key.is_cpu and key_pages.is_cpu):
        raise ValueError(f"{op}: pages must be contiguous and on the CPU; make them by empty_pages")
    out = empty(tokens, heads, value_dim, dtype=query.dtype)
    status = library().ppomax_paged_attention_cpu(
        query.data_ptr(), q[0], q[1], key.data_ptr(), k[0], k[1], value.data_ptr(), v[0], v[1], DTYPES[query.dtype],
        tokens, heads, kv_heads, dim, value_dim, key_pages.data_ptr(), value_pages.data_ptr(), key_pages.shape[0],
        tables.data_ptr(), *tables.shape, sequences.data_ptr(), positions.data_ptr(), scale, window, softcap,
        out.data_ptr(), get_num_threads(),
    )  # fmt: skip
    _served(op, status, tables, key_pages)
    return out


def _served(op: str, status: int, tables: Tensor, key_pages: Tensor) -> None:
    if status == BAD_PAGE:
        raise ValueError(
            f"{op}: a token's sequence, position or page lies outside {tuple(tables.shape)} tables of "
            f"{key_pages.shape[0]} pages; check tables, sequences and positions"
        )
    if status:
        refuse(op, status)


def decode_block_cpu(
    block: Structure,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    pages: Sequence[Tensor],
    where: tuple[Tensor, Tensor, Tensor],
    terms: tuple[float, int, float],
) -> Tensor:
    tables, sequences, positions = where
    rows, y = len(x), empty_like(x)
    scratch = x.new_empty(library().ppomax_decode_block_scratch(byref(block), rows))
    status = library().ppomax_decode_block_cpu(
        byref(block), x.data_ptr(), DTYPES[x.dtype], rows, angles[0].data_ptr(), angles[1].data_ptr(),
        pages[0].data_ptr(), pages[1].data_ptr(), len(pages[0]), tables.data_ptr(), *tables.shape, sequences.data_ptr(),
        positions.data_ptr(), *terms, scratch.data_ptr(), y.data_ptr(), get_num_threads(),
    )  # fmt: skip
    _served("decode_block", status, tables, pages[0])
    return y


def packed_attention_cpu(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, window: int) -> Tensor:
    out = query.new_empty(*query.shape[:2], value.shape[2])
    _run(
        "packed_attention", query, *_heads(query, key, value), *_sizes(query, value), ends.data_ptr(), len(ends) - 1,
        scale, window, out.data_ptr(),
    )  # fmt: skip
    return out


def packed_attention_backward_cpu(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, window: int, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    _run(
        "packed_attention_backward", query, *_heads(query, key, value), dout.contiguous().data_ptr(),
        *_sizes(query, value), ends.data_ptr(), len(ends) - 1, scale, window, dq.data_ptr(), dk.data_ptr(),
        dv.data_ptr(),
    )  # fmt: skip
    return dq, dk, dv


def _heads(*parts: Tensor) -> list[int]:
    """Data and strides of query, key and value."""
    return [x for part in parts for x in (part.data_ptr(), *part.stride()[:2])]


def _sizes(query: Tensor, value: Tensor) -> tuple[int, ...]:
    tokens, heads, dim = query.shape
    return tokens, heads, value.shape[1], dim, value.shape[2]


def packed_linear_cpu(x: Tensor, panels: Tensor, bias: Tensor | None, y: Tensor, add: bool) -> Tensor:
    """x (N, D) with strides, y (N, outputs)."""
    offset = None if x.is_meta else at(bias)
    _run(
        "packed_linear", x, x.data_ptr(), DTYPES[x.dtype], *x.shape, *x.stride(), panels.data_ptr(), offset,
        y.shape[1], add, y.data_ptr(),
    )  # fmt: skip
    return y


def pack_linear_cpu(weight: Tensor, panels: Tensor) -> Tensor:
    sizes = (*weight.shape, *weight.stride())
    _run("pack_linear", weight, weight.data_ptr(), DTYPES[weight.dtype], *sizes, panels.data_ptr())
    return panels


def rms_norm_cpu(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    width, y = weight.shape[0], empty_like(x)
    _run(
        "rms_norm", x, x.data_ptr(), DTYPES[x.dtype], x.numel() // width, width, weight.data_ptr(),
        DTYPES[weight.dtype], offset, eps, y.data_ptr(),
    )  # fmt: skip
    return y


def silu_mul_cpu(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    _run("silu_mul", x, x.data_ptr(), DTYPES[x.dtype], x.numel() // (2 * width), width, y.data_ptr())
    return y


def rms_norm_backward_cpu(x: Tensor, weight: Tensor, offset: float, eps: float, dy: Tensor) -> tuple[Tensor, Tensor]:
    width, dx = weight.shape[0], empty_like(x)
    rows = x.numel() // width
    sums = x.new_empty(-(-rows // GRADIENT_ROWS), width)
    _run(
        "rms_norm_backward", x, x.data_ptr(), rows, width, weight.data_ptr(), offset, eps, dy.data_ptr(), dx.data_ptr(),
        sums.data_ptr(),
    )  # fmt: skip
    return dx, sums.sum(0)


def silu_mul_backward_cpu(x: Tensor, dy: Tensor) -> Tensor:
    width, dx = x.shape[-1] // 2, empty_like(x)
    _run("silu_mul_backward", x, x.data_ptr(), x.numel() // (2 * width), width, dy.data_ptr(), dx.data_ptr())
    return dx


def rotate_cpu(x: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    """x (B, H, T, D) -> the same shape, laid out as (B, T, H, D)."""
    batch, heads, tokens, dim = x.shape
    by_batch, by_head, by_token, _ = x.stride()
    y = x.new_empty(batch, tokens, heads, dim)
    _run(
        "rotate", x, x.data_ptr(), by_batch, by_token, by_head, batch, tokens, heads, dim, cosine.data_ptr(),
        sine.data_ptr(), tokens * dim if cosine.shape[0] > 1 else 0, back, y.data_ptr(),
    )  # fmt: skip
    return y.transpose(1, 2)


def _run(op: str, on: Tensor, *args: Any) -> None:
    """The library's function of that name; nothing for tensors on the meta device, whose results have no contents."""
    if on.is_meta:
        return
    status = getattr(library(), f"ppomax_{op}_cpu")(*args, get_num_threads())
    if status:
        refuse(op, status)
