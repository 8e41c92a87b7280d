"""rms_norm on every instruction set against float64, over widths that fill no register."""

from __future__ import annotations

import pytest
import torch
from ppomax_kernels.internal.rms_norm import rms_norm


@pytest.mark.parametrize("width", [1, 3, 16, 33, 192, 255, 4096])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equals_the_formula(width: int, offset: float, isa: int) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(width, generator=generator)
    for rows, size in ((1, 1.0), (5, 1e-3), (64, 1e3)):
        x = size * torch.randn(rows, width, generator=generator)
        exact = x.double()
        want = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6) * (weight.double() + offset)
        torch.testing.assert_close(rms_norm(x, weight, offset=offset, eps=1e-6).double(), want, rtol=5e-7, atol=1e-7)
    assert rms_norm(torch.zeros(2, 0, 3, width), weight, eps=1e-6).shape == (2, 0, 3, width)


def test_a_row_does_not_depend_on_the_others_nor_on_threads() -> None:
    x, weight, before = torch.randn(3, 500, 48), torch.randn(48), torch.get_num_threads()
    whole = rms_norm(x, weight, eps=1e-5)
    assert torch.equal(whole[1, 17], rms_norm(x[1, 17], weight, eps=1e-5))
    try:
        torch.set_num_threads(2)
        assert torch.equal(whole, rms_norm(x, weight, eps=1e-5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rms_norm(x.transpose(0, 1), weight, eps=1e-5), whole.transpose(0, 1))


@pytest.mark.parametrize("width", [7, 1024, 1500])
def test_bfloat16_is_the_float32_result_rounded_once(width: int, isa: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, weight = torch.randn(9, width, generator=generator).bfloat16(), torch.randn(width, generator=generator)
    for w in (weight, weight.bfloat16()):
        got, want = rms_norm(x, w, eps=1e-6), rms_norm(x.float(), w.float(), eps=1e-6).bfloat16()
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)


def test_zeros_and_bad_values() -> None:
    weight = torch.ones(4)
    assert not rms_norm(torch.zeros(2, 4), weight, eps=1e-6).any()
    assert rms_norm(torch.tensor([1.0, torch.nan, 0.0, 0.0]), weight, eps=1e-6).isnan().all()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: x must be \(..., D\)"):
        rms_norm(torch.zeros(2, 5), torch.ones(4), eps=1e-6)
    with pytest.raises(ValueError, match=r"rms_norm: x must be \(..., D\)"):
        rms_norm(torch.zeros(2, 0), torch.ones(0), eps=1e-6)
    with pytest.raises(ValueError, match=r"must be of torch.float32 or torch.bfloat16 on one device"):
        rms_norm(torch.zeros(2, 4).double(), torch.ones(4), eps=1e-6)
    with pytest.raises(RuntimeError, match="scalar outside its range"):
        rms_norm(torch.zeros(2, 4), torch.ones(4), eps=-1.0)


@pytest.mark.parametrize("width", [1, 3, 16, 33, 192, 1500])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_are_those_of_the_formula(width: int, offset: float, isa: int) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(width, generator=generator)
    for rows, size in ((1, 1.0), (64, 1e-3), (65, 1e3), (200, 1.0)):
        x, up = size * torch.randn(rows, width, generator=generator), torch.randn(rows, width, generator=generator)
        results = []
        for dtype in (torch.float32, torch.float64):
            a, w = (t.to(dtype).requires_grad_() for t in (x, weight))
            if dtype == torch.float32:
                y = rms_norm(a, w, offset=offset, eps=1e-6)
            else:
                y = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6) * (w + offset)
            results.append(torch.autograd.grad(y, (a, w), up.to(dtype)))
        scale = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6)
        terms = (scale * up * (weight + offset)).abs().max(), (scale * up * x).abs().sum(0).max()  # they may cancel
        for got, want, size in zip(*results, terms, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * float(size.detach()))


def test_gradients_do_not_depend_on_threads() -> None:
    x, weight = torch.randn(3, 500, 48, requires_grad=True), torch.randn(48, requires_grad=True)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = rms_norm(x, weight, eps=1e-5)
            found.append(torch.autograd.grad(y, (x, weight), torch.ones_like(y).cumsum(-1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_in_bfloat16_are_refused() -> None:
    with pytest.raises(ValueError, match="gradients are of float32 alone"):
        rms_norm(torch.zeros(2, 4).bfloat16().requires_grad_(), torch.ones(4), eps=1e-6)
