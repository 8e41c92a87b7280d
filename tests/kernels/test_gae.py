"""gae against the double sum, and the pitfalls that are its own."""

import numpy as np
import ppomax_kernels as K
import pytest
import torch
from hypothesis import given

from . import strategies, verify
from .backends import Backend
from .cases import PACKED, Packed
from .contract import f64, same_bits


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_oracle(impl: Backend, case: Packed) -> None:
    verify.gae(impl.bind(K.gae), case, impl.device)


@given(case=strategies.packed())
def test_drawn(impl: Backend, case: Packed) -> None:
    verify.gae(impl.bind(K.gae), case, impl.device)


@pytest.mark.parametrize(("padded", "lam"), [(False, 0.97), (True, 0.97), (False, 1.0)])
def test_long(impl: Backend, padded: bool, lam: float) -> None:
    """T >= 65536: one sequence, longer than a grid's second axis and than any block."""
    if impl.name == "ref":
        pytest.skip("ref: a Python loop over 65536 steps, nothing of length in it")
    if impl.interpreted and (padded or lam == 1.0):
        pytest.skip("triton: half a minute each in the interpreter, which tries packed tokens with lam = 0.97")
    verify.gae(impl.bind(K.gae), Packed((65541, 3), padded, "ends", 1.0, lam), impl.device)


def test_lam_1_is_monte_carlo_lam_0_is_td(impl: Backend) -> None:
    """On numbers that float32 adds exactly."""
    r = torch.tensor([1.0, 2.0, -4.0, 8.0], device=impl.device)
    v = torch.tensor([0.5, 1.5, -2.5, 3.0], device=impl.device)
    ends = torch.tensor([0, 3, 4], dtype=torch.int32, device=impl.device)
    boot = torch.tensor([16.0, 0.0], device=impl.device)
    _, returns = K.gae(r, v, ends, lam=1.0, bootstrap=boot, impl=impl.name)
    np.testing.assert_array_equal(f64(returns), [15.0, 14.0, 12.0, 8.0])
    advantages, _ = K.gae(r, v, ends, lam=0.0, bootstrap=boot, impl=impl.name)
    np.testing.assert_array_equal(f64(advantages), [2.0, -2.0, 14.5, 5.0])


def test_borders(impl: Backend) -> None:
    """The last token of a sequence never sees the next: change the next, nothing moves."""
    x = Packed((5, 9, 1, 30), gamma=0.99).draw(impl.device)
    before = K.gae(x["rewards"], x["values"], x["cu_seqlens"], impl=impl.name)
    for t in (x["rewards"], x["values"]):
        t[14:] += 100.0
    after = K.gae(x["rewards"], x["values"], x["cu_seqlens"], impl=impl.name)
    for a, b in zip(before, after, strict=True):
        same_bits("tokens before the change", a[:14], b[:14])
        assert not bool((a[14:] == b[14:]).any())


@pytest.mark.parametrize("mask", ["none", "holes"])
def test_alone_or_among_many(impl: Backend, mask: str) -> None:
    lengths = (7, 1, 130, 33)
    x = Packed(lengths, mask=mask, lams=True, bootstrap=True, gamma=0.98).draw(impl.device)
    whole = K.gae(
        x["rewards"],
        x["values"],
        x["cu_seqlens"],
        x["mask"],
        gamma=0.98,
        lam=x["lams"],
        bootstrap=x["bootstrap"],
        impl=impl.name,
    )
    at = 0
    for s, n in enumerate(lengths):
        span, one = slice(at, at + n), slice(s, s + 1)
        ends = torch.tensor([0, n], dtype=torch.int32, device=impl.device)
        only = None if x["mask"] is None else x["mask"][span]
        alone = K.gae(
            x["rewards"][span],
            x["values"][span],
            ends,
            only,
            gamma=0.98,
            lam=x["lams"][one],
            bootstrap=x["bootstrap"][one],
            impl=impl.name,
        )
        for what, a, b in zip(("advantages", "returns"), alone, whole, strict=True):
            same_bits(f"{what} of sequence {s}", a, b[span])
        at += n


def test_packed_is_padded(impl: Backend) -> None:
    lengths = (7, 1, 64, 33)
    x = Packed(lengths, gamma=0.98).draw(impl.device)
    rows = [
        torch.nn.utils.rnn.pad_sequence(list(t.split(lengths)), batch_first=True, padding_value=torch.nan)
        for t in (x["rewards"], x["values"])
    ]
    keep = ~torch.isnan(rows[0])
    packed = K.gae(x["rewards"], x["values"], x["cu_seqlens"], gamma=0.98, impl=impl.name)
    padded = K.gae(*rows, mask=keep, gamma=0.98, impl=impl.name)
    for a, b in zip(packed, padded, strict=True):
        same_bits("packed and padded", a, b[keep])


def test_rows_far_apart(impl: Backend) -> None:
    """Row strides whose multiples pass 2^31 elements."""
    if impl.interpreted:
        pytest.skip("triton: the interpreter copies the whole storage of a tensor, 4 GiB here")
    far, steps = 2**30 + 512, 40
    try:
        buffers = [torch.empty(2 * far + steps, dtype=torch.bfloat16, device=impl.device) for _ in range(2)]
    except RuntimeError as error:
        pytest.skip(f"{impl.name}: no 8 GiB of address space here ({error})")
    near = [
        torch.randn(3, steps, generator=torch.Generator().manual_seed(i)).bfloat16().to(impl.device) for i in range(2)
    ]
    wide = [b.as_strided((3, steps), (far, 1)) for b in buffers]
    for w, n in zip(wide, near, strict=True):
        w.copy_(n)
    for a, b in zip(K.gae(*wide, impl=impl.name), K.gae(*near, impl=impl.name), strict=True):
        same_bits("far apart", a, b)
