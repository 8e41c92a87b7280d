"""Causal attention over a paged KV cache, for the tokens of one forward, wherever each of them stands in its sequence.
Keys and values of the tokens are written into the pages first, then token n at position p of its sequence attends to
positions max(0, p - window + 1) .. p. One call serves decoding (one token a sequence) and prefill (many) alike: nothing
is concatenated, padded or masked, and a page that several sequences share is read where it lies.
Keys lie transposed inside a page, so that one register holds one dimension of many keys: scores need no sums across
lanes, and the query heads of a group share each load. Reads every key and value that is attended to once for each
group. Internal to the engine's rollout: no gradient, and written for tensors that it made itself."""

import torch
from torch import Tensor

from .. import checks
from ..backends import reference
from ..dispatch import Table, late, pick

PAGE = 16
"""Tokens of a page: as many as fit the widest register."""

FORWARD: Table = {"cpu": late("backends.native_internal", "paged_attention_cpu"), "ref": reference.paged_attention}


def empty_pages(
    pages: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Key pages (pages, kv_heads, key_dim, PAGE) and value pages (pages, kv_heads, PAGE, value_dim), zeros, so that
    memory is taken now and not while decoding."""
    keys = torch.empty(pages, kv_heads, key_dim, PAGE, dtype=dtype, device=device).zero_()
    return keys, torch.empty(pages, kv_heads, PAGE, value_dim, dtype=dtype, device=device).zero_()


def paged_attention(
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
    """`softmax(cap(scale * query @ keys.T)) @ values` (N, H, Dv) for each token over its own sequence's pages, in the
    dtype of query; `key_pages` and `value_pages` are written in place. cap(x) = softcap * tanh(x / softcap).

    query (N, H, D), key (N, G, D), value (N, G, Dv) with H a multiple of G, the last dimension contiguous; pages as
    `empty_pages` makes them, all of one dtype: float32, bfloat16 or float16. tables (S, blocks) int32: the pages of a
    sequence in the order of its positions. sequences (N,) int32: which row of `tables` each token belongs to.
    positions (N,) int32: where it stands in it; tokens of one sequence may come in any order. window 0: all positions
    up to its own; softcap 0: none. The result does not depend on what else is in the call.
    Raises TypeError and ValueError; on a CPU also for a page, sequence or position outside the arrays.
    """
    op = "paged_attention"
    name = pick(op, impl, query.device, FORWARD)
    if query.ndim != 3 or key.ndim != 3 or value.ndim != 3:
        raise ValueError(
            f"{op}: query, key and value must have shape (N, heads, dim), got {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(value.shape)}"
        )
    tokens, heads, dim = query.shape
    groups, value_dim = key.shape[1], value.shape[2]
    if key.shape != (tokens, groups, dim) or value.shape[:2] != key.shape[:2] or groups == 0 or heads % groups:
        raise ValueError(
            f"{op}: for query {tuple(query.shape)} key must be (N, G, D) and value (N, G, Dv) with H a multiple of G, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key_pages.shape[1:] != (groups, dim, PAGE) or value_pages.shape != (len(key_pages), groups, PAGE, value_dim):
        raise ValueError(
            f"{op}: pages must be (pages, {groups}, {dim}, {PAGE}) and (pages, {groups}, {PAGE}, {value_dim}), got "
            f"{tuple(key_pages.shape)} and {tuple(value_pages.shape)}; make them by empty_pages"
        )
    for what, x in {"key": key, "value": value, "key_pages": key_pages, "value_pages": value_pages}.items():
        if x.dtype != query.dtype:
            raise TypeError(f"{op}: {what} must be {query.dtype} like query, got {x.dtype}")
    checks.floating(op, impl, query=query)
    check_places(op, query, tables, sequences, positions)
    check_terms(op, window, softcap)
    args = (query, key, value, key_pages, value_pages, tables, sequences, positions, scale, window, softcap)
    return FORWARD[name](*args)  # type: ignore[no-any-return]


def check_places(op: str, x: Tensor, tables: Tensor, sequences: Tensor, positions: Tensor) -> None:
    """ValueError unless they name, on its device, a place for each of the tokens of x (N, ...)."""
    for what, place in {"tables": tables, "sequences": sequences, "positions": positions}.items():
        if place.dtype != torch.int32 or not place.is_contiguous() or place.device != x.device:
            raise ValueError(
                f"{op}: {what} must be int32, contiguous and on {x.device}, got {place.dtype}, {place.device}"
            )
    tokens = len(x)
    if tables.ndim != 2 or sequences.shape != (tokens,) or positions.shape != (tokens,):
        raise ValueError(
            f"{op}: tables must be (S, blocks), sequences and positions ({tokens},), got {tuple(tables.shape)}, "
            f"{tuple(sequences.shape)}, {tuple(positions.shape)}"
        )


def check_terms(op: str, window: int, softcap: float) -> None:
    """ValueError for a window or a cap that is none."""
    checks.number(op, "softcap", softcap, 0.0, float("inf"))
    if window < 0:
        raise ValueError(f"{op}: window must be 0 (none) or more, got {window}")
