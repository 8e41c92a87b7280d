# mypy: allow-untyped-defs
"""paged_decode: one program a sequence, key head and SPLIT of positions, online softmax over BLOCK positions at a time.

The query heads of a group are the rows of one tensor-core product, padded to 16, so each key and value is read once:
2 * 2 * D bytes a position and key head in 16 bits, which is all of the work. The program whose split holds the token's
own position starts from that token's key and value, still in registers, and writes them into the page; nothing reads
them there in this launch. A sequence that ends within its first split is finished by that program; else each leaves
its float32 sums, and a second kernel joins them in the order of positions. Lengths come from the device, so the grid
is as wide as the tables: programs past a sequence's end stop at once."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.launch_triton import Case, floats, integers, launch
from ..backends.math_triton import INTERPRETED, LOG2E, tanh
from .paged_decode import SPLIT


@triton.jit
def _scored(scores, scale, softcap, CAP: tl.constexpr):
    """In units of log2(e), for exp2."""
    if CAP:
        return (softcap * LOG2E) * tanh(scores * (scale / softcap))
    else:
        return scores * (scale * LOG2E)


@triton.jit
def _product(a, b):
    if INTERPRETED:  # its dot takes bf16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["window", "splits"])
def _decode_kernel(
    out_ptr, query_ptr, key_ptr, value_ptr, key_pages_ptr, value_pages_ptr, tables_ptr, sequences_ptr, positions_ptr,
    sums_ptr, tops_ptr, totals_ptr, query_row, query_head, key_row, key_head, value_row, value_head, table_row, splits,
    scale, softcap, window, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions_ptr + token)
    first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    low = split * SPLIT
    if (low > position) | (low + SPLIT <= first):
        return
    own = low + SPLIT > position
    token = token.to(tl.int64)
    rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    inside = (rows < GROUP)[:, None] & (lanes < DIM)[None, :]
    heads = head * GROUP + rows
    q = tl.load(query_ptr + token * query_row + heads[:, None] * query_head + lanes[None, :], mask=inside, other=0.0)
    groups = HEADS // GROUP
    table_ptr = tables_ptr + tl.load(sequences_ptr + token).to(tl.int64) * table_row
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, LANES), tl.float32)
    if own:
        new_key = tl.load(key_ptr + token * key_row + head * key_head + lanes, mask=lanes < DIM, other=0.0)
        new_value = tl.load(value_ptr + token * value_row + head * value_head + lanes, mask=lanes < DIM, other=0.0)
        page = tl.load(table_ptr + position // PAGE).to(tl.int64)
        there = ((page * groups + head) * PAGE + position % PAGE) * DIM + lanes
        tl.store(key_pages_ptr + there, new_key, mask=lanes < DIM)
        tl.store(value_pages_ptr + there, new_value, mask=lanes < DIM)
        mine = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1)
        top = _scored(mine, scale, softcap, CAP)
        total += 1.0
        sums += new_value.to(tl.float32)[None, :]
    start = tl.maximum(low, first) // BLOCK * BLOCK
    for begin in range(start, tl.minimum(low + SPLIT, position), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        seen = (at < position) & (at >= first)
        page = tl.load(table_ptr + at // PAGE, mask=seen, other=0).to(tl.int64)
        there = ((page * groups + head) * PAGE + at % PAGE) * DIM
        wanted = seen[:, None] & (lanes < DIM)[None, :]
        k = tl.load(key_pages_ptr + there[:, None] + lanes[None, :], mask=wanted, other=0.0)
        v = tl.load(value_pages_ptr + there[:, None] + lanes[None, :], mask=wanted, other=0.0)
        scores = _scored(_product(q, tl.trans(k)), scale, softcap, CAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + _product(weights.to(v.dtype), v)
        top = higher
    if own & (low <= first):
        tl.store(out_ptr + (token * HEADS + heads[:, None]) * DIM + lanes[None, :], sums / total[:, None], mask=inside)
    else:
        place = (token * splits + split) * HEADS + heads
        tl.store(sums_ptr + place[:, None] * DIM + lanes[None, :], sums, mask=inside)
        tl.store(tops_ptr + place, top, mask=rows < GROUP)
        tl.store(totals_ptr + place, total, mask=rows < GROUP)


@triton.jit(do_not_specialize=["window", "splits"])
def _join_kernel(
    out_ptr, sums_ptr, tops_ptr, totals_ptr, positions_ptr, splits, window, HEADS: tl.constexpr, DIM: tl.constexpr,
    SPLIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    position = tl.load(positions_ptr + token)
    first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    begin = first // SPLIT
    end = position // SPLIT + 1
    if end - begin < 2:
        return
    lanes = tl.arange(0, LANES)
    token = token.to(tl.int64)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    for split in range(begin, end):
        place = (token * splits + split) * HEADS + head
        its_top = tl.load(tops_ptr + place)
        higher = tl.maximum(top, its_top)
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(its_top - higher)
        total = total * shrink + weight * tl.load(totals_ptr + place)
        sums = sums * shrink + weight * tl.load(sums_ptr + place * DIM + lanes, mask=lanes < DIM, other=0.0)
        top = higher
    tl.store(out_ptr + (token * HEADS + head) * DIM + lanes, sums / total, mask=lanes < DIM)


@triton.jit
def _write_kernel(
    key_ptr, value_ptr, key_pages_ptr, value_pages_ptr, tables_ptr, sequences_ptr, positions_ptr, key_row, key_head,
    value_row, value_head, table_row, GROUPS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    page = tl.load(tables_ptr + tl.load(sequences_ptr + token).to(tl.int64) * table_row + position // PAGE)
    heads = tl.arange(0, HEADS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    inside = (heads < GROUPS) & (lanes < DIM)
    there = ((page.to(tl.int64) * GROUPS + heads) * PAGE + position % PAGE) * DIM + lanes
    k = tl.load(key_ptr + token * key_row + heads * key_head + lanes, mask=inside)
    v = tl.load(value_ptr + token * value_row + heads * value_head + lanes, mask=inside)
    tl.store(key_pages_ptr + there, k, mask=inside)
    tl.store(value_pages_ptr + there, v, mask=inside)


def constants(dim: int, element_size: int) -> dict[str, int]:
    """Of BLOCK 32, 64 and 128, 2, 4 and 8 warps, 2 and 3 stages the best or near it on an H200 at every shape tried,
    from 8 to 256 sequences and 1 to 7 query heads a key head: programs enough hide each other's waits."""
    lanes = max(16, triton.next_power_of_2(dim))
    block = max(16, min(64, 16384 // (lanes * element_size)))
    return {"LANES": lanes, "BLOCK": block, "num_warps": 4, "num_stages": 2}


def paged_decode_triton(
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
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    tokens, heads, dim = query.shape
    groups, page = key_pages.shape[1:3]
    splits = -(-tables.shape[1] * page // SPLIT)
    out = query.new_empty(tokens, heads, dim)
    if not tokens:
        return out
    several = splits > 1
    sums = query.new_empty((tokens, splits, heads, dim) if several else (1,), dtype=torch.float32)
    tops, totals = sums.new_empty((2, tokens, splits, heads) if several else (2, 1))
    fixed = {"HEADS": heads, "DIM": dim, "SPLIT": SPLIT}
    options = constants(dim, query.element_size())
    launch(
        _decode_kernel, (tokens, groups, splits), out, query, key, value, key_pages, value_pages, tables, sequences,
        positions, sums, tops, totals, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], tables.stride(0),
        splits, scale, softcap, window, GROUP=heads // groups, PAGE=page, CAP=softcap > 0.0,
        ROWS=max(16, triton.next_power_of_2(heads // groups)), **fixed, **options,
    )  # fmt: skip
    if several:
        launch(
            _join_kernel, (tokens, heads), out, sums, tops, totals, positions, splits, window, LANES=options["LANES"],
            num_warps=1, **fixed,
        )  # fmt: skip
    return out


def write_pages_triton(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, tables: Tensor, sequences: Tensor, at: Tensor
) -> None:
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    tokens, groups, dim = key.shape
    if tokens:
        launch(
            _write_kernel, (tokens,), key, value, key_pages, value_pages, tables, sequences, at, *key.stride()[:2],
            *value.stride()[:2], tables.stride(0), GROUPS=groups, DIM=dim, PAGE=key_pages.shape[2],
            HEADS=triton.next_power_of_2(groups), LANES=triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    kinds = (
        (torch.float32, 4, 2, 64, 16, 0.0),
        (torch.float16, 14, 2, 64, 16, 0.0),
        (torch.float16, 16, 1, 80, 32, 0.0),
        (torch.bfloat16, 32, 32, 128, 64, 0.0),
        (torch.bfloat16, 16, 8, 256, 32, 50.0),
        (torch.float32, 8, 4, 256, 16, 50.0),
        (torch.bfloat16, 32, 8, 128, 16, 0.0),
    )
    for dtype, heads, groups, dim, page, softcap in kinds:
        q, k, pages = floats(4, heads, dim, dtype=dtype), floats(4, groups, dim, dtype=dtype), (9, groups, page, dim)
        keys, values, at = floats(*pages, dtype=dtype), floats(*pages, dtype=dtype), integers(4, dtype=torch.int32)
        tables = integers(4, 2048 // page, dtype=torch.int32)
        name = f"{str(dtype)[6:]} H={heads} G={groups} D={dim} page={page} cap={softcap:g}"
        yield name, partial(write_pages_triton, k, k, keys, values, tables, at, at)
        yield name, partial(paged_decode_triton, q, k, k, keys, values, tables, at, at, 0.1, 0, softcap)
