"""Attention of decoding on a GPU: one new token of each sequence over the pages of its keys and values.

The step's own key and value are written into the pages by the kernel that reads them, so a layer takes one launch, and
one more where a sequence may be longer than SPLIT tokens. Pages are row-major, of 16, 32 or 64 tokens, and their number
in a table bounds nothing but the launch: lengths are read on the device. Every key and value is read once for all query
heads of its group. Internal to the engine's rollout: no gradient, and written for tensors that it made itself."""

import torch
from torch import Tensor

from ..backends import reference
from ..dispatch import Table, late, pick
from .paged_attention import check_places, check_terms

PAGES = (16, 32, 64)
"""Tokens of a page that the kernel serves."""
SPLIT = 512
"""Tokens that one program attends to; sums over more are joined in the order of positions, so the bits of a result
depend on its own sequence alone."""
WIDEST_HEAD = 256

FORWARD: Table = {"triton": late("internal.paged_decode_triton", "paged_decode_triton"), "ref": reference.paged_decode}
WRITE: Table = {"triton": late("internal.paged_decode_triton", "write_pages_triton"), "ref": reference.write_row_pages}


def empty_row_pages(
    pages: int, kv_heads: int, page: int, dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Key and value pages, both (pages, kv_heads, page, dim), zeros."""
    keys, values = (torch.zeros(pages, kv_heads, page, dim, dtype=dtype, device=device) for _ in range(2))
    return keys, values


def serves(dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes heads of this width and dtype."""
    return dim <= WIDEST_HEAD and dtype in (torch.float32, torch.bfloat16, torch.float16)


def paged_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """`softmax(cap(scale * query @ keys.T)) @ values` (N, H, D) for one new token of each of N sequences over positions
    max(0, p - window + 1) .. p of its own, in the dtype of query; its key and value are written into the pages first.
    cap(x) = softcap * tanh(x / softcap).

    query (N, H, D), key and value (N, G, D) with H a multiple of G, D at most 256 and contiguous; key_pages and
    value_pages (pages, G, P, D) with P in PAGES, all of one dtype: float32, bfloat16 or float16. tables (S, blocks)
    int32: the pages of a sequence in the order of its positions; it may be wider than any sequence. sequences (N,)
    int32: which row of `tables` each token belongs to, each once. positions (N,) int32: where it stands.
    window 0: all positions up to its own; softcap 0: none. Raises TypeError and ValueError; a position or page outside
    the arrays is not looked for.
    """
    op = "paged_decode"
    name = pick(op, impl, query.device, FORWARD)
    _check(op, key, value, key_pages, value_pages, tables, sequences, positions)
    tokens, groups, dim = key.shape
    if query.ndim != 3 or (query.shape[0], query.shape[2]) != (tokens, dim) or query.shape[1] % groups:
        raise ValueError(
            f"{op}: query must be ({tokens}, H, {dim}) with H a multiple of {groups} key heads, got "
            f"{tuple(query.shape)}"
        )
    if query.dtype != key.dtype or not serves(dim, query.dtype):
        raise TypeError(
            f"{op}: query and key must be of one dtype, float32, bfloat16 or float16, with heads of at most "
            f"{WIDEST_HEAD}, got {query.dtype} and {key.dtype}, heads of {dim}"
        )
    check_terms(op, window, softcap)
    args = (query, key, value, key_pages, value_pages, tables, sequences, positions, scale, window, softcap)
    return FORWARD[name](*args)  # type: ignore[no-any-return]


def write_row_pages(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Put the key and value (N, G, D) of each token at its position of its sequence, in pages as for `paged_decode`:
    what a prompt, whose tokens attend to each other and not to pages, leaves for the steps after it."""
    op = "write_row_pages"
    name = pick(op, impl, key.device, WRITE)
    _check(op, key, value, key_pages, value_pages, tables, sequences, positions)
    WRITE[name](key, value, key_pages, value_pages, tables, sequences, positions)


def _check(
    op: str,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
) -> None:
    if key.ndim != 3 or key.shape != value.shape or not key.shape[1]:
        raise ValueError(f"{op}: key and value must be (N, G, D), got {tuple(key.shape)} and {tuple(value.shape)}")
    _, groups, dim = key.shape
    shape = key_pages.shape
    fits = key_pages.ndim == 4 and (shape[1], shape[3]) == (groups, dim) and value_pages.shape == shape
    if not fits or shape[2] not in PAGES or not (key_pages.is_contiguous() and value_pages.is_contiguous()):
        raise ValueError(
            f"{op}: pages must be (pages, {groups}, P, {dim}) with P one of {PAGES}, contiguous, got {tuple(shape)} "
            f"and {tuple(value_pages.shape)}; make them by empty_row_pages"
        )
    for what, x in {"value": value, "key_pages": key_pages, "value_pages": value_pages}.items():
        if x.dtype != key.dtype:
            raise TypeError(f"{op}: {what} must be {key.dtype} like key, got {x.dtype}")
    check_places(op, key, tables, sequences, positions)
