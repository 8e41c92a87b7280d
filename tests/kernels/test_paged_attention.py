"""paged_attention on every instruction set against plain softmax attention in float64, over ragged lengths, windows,
caps, dtypes and widths; and wrong versions of it are caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from ppomax_kernels.internal.paged_attention import PAGE, empty_pages, paged_attention
from torch import Tensor

LENGTHS = [1, 2, 15, 16, 17, 33, 40, 100]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


class Case(NamedTuple):
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32


CASES = [
    Case(6, 2, 32, 32),
    Case(4, 4, 8, 8, window=5),
    Case(5, 1, 13, 7, window=16, softcap=2.0),
    Case(8, 1, 64, 128, softcap=1.0),
    Case(2, 1, 3, 20, window=1),
    Case(16, 2, 128, 128, window=33, dtype=torch.bfloat16),
    Case(6, 2, 32, 32, softcap=2.0, dtype=torch.bfloat16),
    Case(6, 3, 24, 40, window=17, dtype=torch.float16),
]


class Inputs(NamedTuple):
    args: tuple[Tensor, ...]
    keys: list[Tensor]
    """Of each sequence, (L, G, D), the new token's included."""
    values: list[Tensor]


def make(case: Case, seed: int = 0) -> Inputs:
    """Sequences of LENGTHS in shuffled pages; their last tokens are the call's. What nobody should read is NaN."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(case.dtype)

    count, blocks = len(LENGTHS), -(-max(LENGTHS) // PAGE)
    key_pages, value_pages = empty_pages(count * blocks, case.groups, case.key_dim, case.value_dim, case.dtype)
    key_pages.fill_(torch.nan)
    value_pages.fill_(torch.nan)
    tables = torch.randperm(count * blocks, generator=g).view(count, blocks).int()
    keys = [draw(n, case.groups, case.key_dim) for n in LENGTHS]
    values = [draw(n, case.groups, case.value_dim) for n in LENGTHS]
    for s, n in enumerate(LENGTHS):
        for t in range(n - 1):
            key_pages[tables[s, t // PAGE], :, :, t % PAGE] = keys[s][t]
            value_pages[tables[s, t // PAGE], :, t % PAGE] = values[s][t]
    query = draw(case.heads, count, case.key_dim).transpose(0, 1)  # as transformers hands it over: strided
    new_keys, new_values = torch.stack([k[-1] for k in keys]), torch.stack([v[-1] for v in values])
    sequences, positions = torch.arange(count).int(), torch.tensor(LENGTHS).int() - 1
    return Inputs((query, new_keys, new_values, key_pages, value_pages, tables, sequences, positions), keys, values)


def truth(case: Case, made: Inputs, scale: float) -> Tensor:
    out = []
    for row, keys, values in zip(made.args[0].cpu(), made.keys, made.values, strict=True):
        repeat = case.heads // case.groups
        k, v = (x.double().repeat_interleave(repeat, 1)[-case.window :] for x in (keys, values))
        scores = scale * torch.einsum("hd,lhd->hl", row.double(), k)
        scores = case.softcap * torch.tanh(scores / case.softcap) if case.softcap else scores
        out.append(torch.einsum("hl,lhd->hd", torch.softmax(scores, -1), v))
    return torch.stack(out)


def error(case: Case, run=paged_attention, impl: str = "cpu") -> float:  # type: ignore[no-untyped-def]
    made = make(case)
    got = run(*made.args, scale=0.3, window=case.window, softcap=case.softcap, impl=impl)
    assert got.dtype == case.dtype
    gap = (got.double() - truth(case, made, 0.3)).abs().max().item()
    return gap if gap == gap else float("inf")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_equals_softmax_attention(case: Case, isa: int) -> None:
    assert error(case) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_softmax_attention(case: Case) -> None:
    assert error(case, impl="ref") <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("impl", ["cpu", "ref"])
def test_a_whole_prompt_in_one_call_equals_token_by_token(impl: str) -> None:
    case, count = CASES[0], 37
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(count, n, 32, generator=g) for n in (6, 2, 2))
    tables, zeros = torch.tensor([[2, 0, 1]]).int(), torch.zeros(count).int()
    at = torch.arange(count).int()
    whole = paged_attention(q, k, v, *empty_pages(3, 2, 32, 32, case.dtype), tables, zeros, at, scale=0.2, impl=impl)
    pages = empty_pages(3, 2, 32, 32, case.dtype)
    single = [
        paged_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], *pages, tables, zeros[:1], at[i : i + 1], scale=0.2)
        for i in range(count)
    ]
    torch.testing.assert_close(whole, torch.cat(single), rtol=0, atol=1e-6)


def test_threads_change_no_bit() -> None:
    case, before = Case(8, 2, 64, 64), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(paged_attention(*make(case).args, scale=0.3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def _shift(args: tuple[Tensor, ...], place: int, by: int) -> tuple[Tensor, ...]:
    return (*args[:place], (args[place] + by).clamp(min=0), *args[place + 1 :])


def mutants(op: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """Wrong versions of attention over pages, by name."""
    return {
        "window ignored": lambda *a, **kw: op(*a, **kw | {"window": 0}),
        "window one longer": lambda *a, **kw: op(*a, **kw | {"window": kw["window"] and kw["window"] + 1}),
        "cap ignored": lambda *a, **kw: op(*a, **kw | {"softcap": 0.0}),
        "scale ignored": lambda *a, **kw: op(*a, **kw | {"scale": 1.0}),
        "one position short": lambda *a, **kw: op(*_shift(a, 7, -1), **kw),
        "pages in the order of the arena": lambda *a, **kw: op(*a[:5], a[5].sort(1).values, *a[6:], **kw),
        "sequences swapped": lambda *a, **kw: op(*a[:6], a[6].flip(0).contiguous(), a[7], **kw),
        "new key not written": lambda *a, **kw: op(a[0], a[1] * 0, *a[2:], **kw),
        "heads in another order": lambda *a, **kw: op(a[0].flip(1), *a[1:], **kw),
        "a percent off": lambda *a, **kw: op(*a, **kw) * 1.01,
    }


MUTANTS = mutants(paged_attention)


@pytest.mark.parametrize("name", MUTANTS)
def test_caught(name: str) -> None:
    assert any(error(c, MUTANTS[name]) > TOLERANCE[c.dtype] for c in CASES), f"the mutant {name!r} survived"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (5, 999, "page lies outside"),
        (6, 99, "sequence, position or page lies outside"),
        (7, 4000, "sequence, position or page lies outside"),
        (7, -1, "sequence, position or page lies outside"),
    ],
)
def test_indices_outside_the_arrays_are_refused(place: int, value: int, message: str) -> None:
    args = list(make(CASES[0]).args)
    args[place] = torch.full_like(args[place], value)
    with pytest.raises(ValueError, match=message):
        paged_attention(*args, scale=0.3)


def test_bad_arguments_are_named() -> None:
    query, key, *rest = make(CASES[0]).args
    with pytest.raises(ValueError, match=r"key must be \(N, G, D\)"):
        paged_attention(query, key[:, :, :-1], *rest, scale=0.3)
    with pytest.raises(TypeError, match=r"key must be torch.float32 like query, got torch.bfloat16"):
        paged_attention(query, key.bfloat16(), *rest, scale=0.3)
    with pytest.raises(ValueError, match="positions must be int32"):
        paged_attention(query, key, *rest[:-1], rest[-1].long(), scale=0.3)
    with pytest.raises(ValueError, match="window must be 0"):
        paged_attention(query, key, *rest, scale=0.3, window=-1)
    with pytest.raises(ValueError, match="softcap must be finite"):
        paged_attention(query, key, *rest, scale=0.3, softcap=-1.0)
