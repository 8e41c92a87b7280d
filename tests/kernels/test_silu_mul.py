"""silu_mul on every instruction set against float64, over widths that fill no register, and far out."""

from __future__ import annotations

import pytest
import torch
from ppomax_kernels.internal.silu_mul import silu_mul
from torch import Tensor


def formula(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("width", [1, 3, 16, 33, 448, 1500])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1000.0])
def test_equals_the_formula(width: int, size: float, isa: int) -> None:
    x = size * torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(width))
    # e^-g is off by the rounding of its exponent, 5e-6 at the most, where silu is next to nothing
    torch.testing.assert_close(silu_mul(x).double(), formula(x), rtol=8e-6, atol=1e-30)
    near = x.clamp(min=-8.0)
    torch.testing.assert_close(silu_mul(near).double(), formula(near), rtol=1e-6, atol=1e-30)
    assert torch.equal(silu_mul(x.bfloat16()), silu_mul(x.bfloat16().float()).bfloat16())
    assert silu_mul(torch.zeros(2, 0, 2 * width)).shape == (2, 0, width)


def test_ends_of_the_line(isa: int) -> None:
    inf, nan = torch.inf, torch.nan
    got = silu_mul(torch.tensor([inf, -200.0, nan, 0.0, 1.0, 1.0, 1.0, 1.0]))
    assert got[0] == inf
    assert got[1].abs() < 1e-30
    assert got[2].isnan()
    assert got[3] == 0.0


def test_threads_change_nothing() -> None:
    x, before = torch.randn(300, 400), torch.get_num_threads()
    alone = silu_mul(x)
    try:
        torch.set_num_threads(2)
        assert torch.equal(silu_mul(x), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(silu_mul(x.T.contiguous().T), alone)


def test_bad_arguments_are_named() -> None:
    for bad in (torch.zeros(2, 3), torch.zeros(2, 0), torch.zeros(2, 4).double(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"silu_mul: x must be \(..., 2 D\) in float32 or bfloat16"):
            silu_mul(bad)


@pytest.mark.parametrize("width", [1, 3, 16, 33, 448])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_gradients_are_those_of_the_formula(width: int, size: float, isa: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, up = size * torch.randn(5, 2 * width, generator=generator), torch.randn(5, width, generator=generator)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    (got,) = torch.autograd.grad(silu_mul(leaf), leaf, up)
    (want,) = torch.autograd.grad(formula(exact), exact, up.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * max(1.0, size))


def test_gradients_in_bfloat16_are_refused() -> None:
    with pytest.raises(ValueError, match="gradients are of float32 alone"):
        silu_mul(torch.zeros(2, 4).bfloat16().requires_grad_())
