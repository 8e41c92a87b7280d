"""The ops of the engine's rollout on CPUs, by the compiled library."""

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
    if status:
        if status == BAD_PAGE:
            raise ValueError(
                f"{op}: a token's sequence, position or page lies outside {tuple(tables.shape)} tables of "
                f"{key_pages.shape[0]} pages; check tables, sequences and positions"
            )
        refuse(op, status)
    return out


def packed_attention_cpu(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, window: int) -> Tensor:
    out = empty(*query.shape[:2], value.shape[2])
    status = library().ppomax_packed_attention_cpu(
        *_heads(query, key, value), *_sizes(query, value), ends.data_ptr(), len(ends) - 1, scale, window,
        out.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("packed_attention", status)
    return out


def packed_attention_backward_cpu(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float, window: int, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty(x.shape) for x in (query, key, value))
    status = library().ppomax_packed_attention_backward_cpu(
        *_heads(query, key, value), dout.contiguous().data_ptr(), *_sizes(query, value), ends.data_ptr(),
        len(ends) - 1, scale, window, dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("packed_attention", status)
    return dq, dk, dv


def _heads(*parts: Tensor) -> list[int]:
    """Data and strides of query, key and value."""
    return [x for part in parts for x in (part.data_ptr(), *part.stride()[:2])]


def _sizes(query: Tensor, value: Tensor) -> tuple[int, ...]:
    tokens, heads, dim = query.shape
    return tokens, heads, value.shape[1], dim, value.shape[2]


def packed_linear_cpu(x: Tensor, panels: Tensor, bias: Tensor | None, y: Tensor, add: bool) -> Tensor:
    """x (N, D) with strides, y (N, outputs)."""
    status = library().ppomax_packed_linear_cpu(
        x.data_ptr(), DTYPES[x.dtype], *x.shape, *x.stride(), panels.data_ptr(), at(bias), y.shape[1], add,
        y.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("packed_linear", status)
    return y


def pack_linear_cpu(weight: Tensor, panels: Tensor) -> Tensor:
    status = library().ppomax_pack_linear_cpu(
        weight.data_ptr(), DTYPES[weight.dtype], *weight.shape, *weight.stride(), panels.data_ptr(), get_num_threads()
    )
    if status:
        refuse("pack_linear", status)
    return panels


def rms_norm_cpu(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    width, y = weight.shape[0], empty_like(x)
    status = library().ppomax_rms_norm_cpu(
        x.data_ptr(), DTYPES[x.dtype], x.numel() // width, width, weight.data_ptr(), DTYPES[weight.dtype], offset, eps,
        y.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("rms_norm", status)
    return y


def silu_mul_cpu(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    y = empty(*x.shape[:-1], width, dtype=x.dtype)
    status = library().ppomax_silu_mul_cpu(
        x.data_ptr(), DTYPES[x.dtype], x.numel() // (2 * width), width, y.data_ptr(), get_num_threads()
    )
    if status:
        refuse("silu_mul", status)
    return y


def rms_norm_backward_cpu(x: Tensor, weight: Tensor, offset: float, eps: float, dy: Tensor) -> tuple[Tensor, Tensor]:
    width, dx = weight.shape[0], empty_like(x)
    rows = x.numel() // width
    sums = empty(-(-rows // GRADIENT_ROWS), width)
    status = library().ppomax_rms_norm_backward_cpu(
        x.data_ptr(), rows, width, weight.data_ptr(), offset, eps, dy.data_ptr(), dx.data_ptr(), sums.data_ptr(),
        get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("rms_norm", status)
    return dx, sums.sum(0)


def silu_mul_backward_cpu(x: Tensor, dy: Tensor) -> Tensor:
    width, dx = x.shape[-1] // 2, empty_like(x)
    status = library().ppomax_silu_mul_backward_cpu(
        x.data_ptr(), x.numel() // (2 * width), width, dy.data_ptr(), dx.data_ptr(), get_num_threads()
    )
    if status:
        refuse("silu_mul", status)
    return dx


def rotate_cpu(x: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    """x (B, H, T, D) -> the same shape, laid out as (B, T, H, D)."""
    batch, heads, tokens, dim = x.shape
    by_batch, by_head, by_token, _ = x.stride()
    y = empty(batch, tokens, heads, dim)
    status = library().ppomax_rotate_cpu(
        x.data_ptr(), by_batch, by_token, by_head, batch, tokens, heads, dim, cosine.data_ptr(), sine.data_ptr(),
        tokens * dim if cosine.shape[0] > 1 else 0, back, y.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("rotate", status)
    return y.transpose(1, 2)
