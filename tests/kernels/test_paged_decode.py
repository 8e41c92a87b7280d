"""paged_decode against plain softmax attention in float64, over ragged lengths, windows, caps, dtypes, head groups and
page sizes; its bits depend on a row's own sequence alone; and wrong versions of it are caught."""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import pytest
import torch
from ppomax_kernels.dispatch import triton_interprets
from ppomax_kernels.internal import paged_decode as op
from ppomax_kernels.internal.paged_decode import empty_row_pages, paged_decode, write_row_pages
from torch import Tensor

from .test_paged_attention import mutants, truth

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton_interprets():
    pytest.skip("neither a CUDA device nor Triton's interpreter", allow_module_level=True)

LENGTHS = [1, 2, 16, 17, 63, 64, 65, 100, 130, 513, 1100]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


class Case(NamedTuple):
    heads: int
    groups: int
    dim: int
    page: int = 16
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32


CASES = [
    Case(4, 2, 32),
    Case(3, 3, 16, page=32, window=5),
    Case(5, 1, 13, page=64, window=16, softcap=2.0),
    Case(16, 1, 64, page=32, softcap=1.0),
    Case(2, 1, 24, window=1),
    Case(8, 2, 128, page=64, window=70, dtype=torch.bfloat16),
    Case(4, 2, 32, page=32, window=600, softcap=2.0, dtype=torch.bfloat16),
    Case(14, 2, 64, dtype=torch.float16),
]


class Inputs(NamedTuple):
    args: tuple[Tensor, ...]
    keys: list[Tensor]
    """Of each sequence, (L, G, D), the new token's included."""
    values: list[Tensor]


def make(case: Case, lengths: list[int] = LENGTHS, blocks: int = 0) -> Inputs:
    """Sequences in shuffled pages; what nobody should read is NaN."""
    g = torch.Generator().manual_seed(sum(lengths))

    def draw(*size: int) -> Tensor:
        return (1.5 * torch.randn(*size, generator=g)).to(case.dtype)

    count, blocks = len(lengths), blocks or -(-max(lengths) // case.page)
    pages = [p.fill_(math.nan) for p in empty_row_pages(count * blocks, case.groups, case.page, case.dim, case.dtype)]
    tables = torch.randperm(count * blocks, generator=g).view(count, blocks).int()
    keys, values = ([draw(n, case.groups, case.dim) for n in lengths] for _ in range(2))
    for s, n in enumerate(lengths):
        at = torch.arange(n - 1)
        where = tables[s, at // case.page].long(), at % case.page
        for store, x in zip(pages, (keys[s], values[s]), strict=True):
            store[where[0], :, where[1]] = x[:-1]
    query = draw(case.heads, count, case.dim).transpose(0, 1)  # as transformers hands it over: strided
    new = [torch.stack([x[-1] for x in part]) for part in (keys, values)]
    args = (query, *new, *pages, tables, torch.arange(count).int(), torch.tensor(lengths).int() - 1)
    return Inputs(tuple(x.to(DEVICE) for x in args), keys, values)


def error(case: Case, run=paged_decode, impl: str = "triton") -> float:  # type: ignore[no-untyped-def]
    made = make(case)
    got = run(*made.args, scale=0.3, window=case.window, softcap=case.softcap, impl=impl)
    assert got.dtype == case.dtype
    want = truth(case, made, 0.3)
    gap = ((got.double().cpu() - want).abs() / (1.0 + want.abs())).max().item()
    return gap if gap == gap else float("inf")


@pytest.mark.parametrize("impl", ["triton", "ref"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_softmax_attention(case: Case, impl: str) -> None:
    assert error(case, impl=impl) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_new_key_and_value_are_left_in_the_pages_and_nothing_else(case: Case) -> None:
    ours, plain = make(case), make(case)
    paged_decode(*ours.args, scale=0.3, impl="triton")
    _, k, v, *stores, tables, sequences, positions = plain.args
    write_row_pages(k, v, *stores, tables, sequences, positions, impl="ref")
    for got, want in zip(ours.args[3:5], stores, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_a_prompt_is_written_where_its_pages_are(case: Case) -> None:
    g = torch.Generator().manual_seed(1)
    lengths = [3, 40, 1]
    rows = torch.tensor([s for s, n in enumerate(lengths) for _ in range(n)]).int().to(DEVICE)
    at = torch.tensor([i for n in lengths for i in range(n)]).int().to(DEVICE)
    tables = torch.randperm(9, generator=g).view(3, 3).int().to(DEVICE)
    k, v = (torch.randn(case.groups, 44, case.dim, generator=g).transpose(0, 1).to(DEVICE) for _ in range(2))
    made = {}
    for impl in ("triton", "ref"):
        made[impl] = empty_row_pages(9, case.groups, case.page, case.dim, torch.float32, DEVICE)
        write_row_pages(k, v, *made[impl], tables, rows, at, impl=impl)
    for got, want in zip(made["triton"], made["ref"], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_bits_depend_on_the_own_sequence_alone(case: Case) -> None:
    """Whatever stands beside it, and however wide the table is."""
    made = make(case)
    whole = paged_decode(*made.args, scale=0.3, window=case.window, impl="triton")
    fresh = make(case).args
    more = torch.cat([fresh[5], torch.zeros(len(LENGTHS), 70, dtype=torch.int32, device=DEVICE)], 1)
    order = [9, 0, 10, 5]
    few = [x[order] for x in (*fresh[:3], *fresh[6:])]
    got = paged_decode(*few[:3], *fresh[3:5], more, *few[3:], scale=0.3, window=case.window, impl="triton")
    assert torch.equal(got, whole[order])


def test_no_rows_are_no_work() -> None:
    q, k, v, *rest = make(CASES[0]).args
    got = paged_decode(q[:0], k[:0], v[:0], *rest[:3], rest[3][:0], rest[4][:0], scale=0.3, impl="triton")
    assert got.shape == (0, 4, 32)


MUTANTS = mutants(paged_decode)


@pytest.mark.parametrize("name", MUTANTS)
def test_caught(name: str) -> None:
    few = [c for c in CASES if c.dtype == torch.float32][:3]
    assert any(error(c, MUTANTS[name]) > TOLERANCE[c.dtype] for c in few), f"the mutant {name!r} survived"


def test_bad_arguments_are_named() -> None:
    query, key, value, *rest = make(CASES[0], [3, 20]).args
    for args, kind, message in (
        ((query[:, :3], key, value), ValueError, r"query must be \(2, H, 32\) with H a multiple of 2 key heads"),
        ((query, key[:, :, :-1], value), ValueError, r"key and value must be \(N, G, D\)"),
        ((query, key.double(), value), TypeError, "value must be torch.float64 like key"),
        ((query.double(), key, value), TypeError, "of one dtype, float32, bfloat16 or float16"),
    ):
        with pytest.raises(kind, match=message):
            paged_decode(*args, *rest, scale=0.3, impl="ref")
    with pytest.raises(ValueError, match="positions must be int32"):
        paged_decode(query, key, value, *rest[:-1], rest[-1].long(), scale=0.3, impl="ref")
    stores = [s[:, :, :8].contiguous() for s in rest[:2]]
    with pytest.raises(ValueError, match=r"P one of \(16, 32, 64\), contiguous, got \(4, 2, 8, 32\)"):
        paged_decode(query, key, value, *stores, *rest[2:], scale=0.3, impl="ref")
    with pytest.raises(ValueError, match="window must be 0"):
        paged_decode(query, key, value, *rest, scale=0.3, window=-1, impl="ref")
    assert not op.serves(257, torch.float32)
    assert not op.serves(64, torch.float64)
