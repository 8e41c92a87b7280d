"""rms_norm on every instruction set against float64, over widths that fill no register."""

from __future__ import annotations

import pytest
import torch
from ppomax_kernels.internal.rms_norm import rms_norm

from tests.kernels.test_packed_linear import isa  # noqa: F401


@pytest.mark.parametrize("width", [1, 3, 16, 33, 192, 255, 4096])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equals_the_formula(width: int, offset: float, isa: int) -> None:  # noqa: F811
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
def test_bfloat16_is_the_float32_result_rounded_once(width: int, isa: int) -> None:  # noqa: F811
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
    with pytest.raises(ValueError, match="must be float32 or bfloat16 on the CPU"):
        rms_norm(torch.zeros(2, 4).double(), torch.ones(4), eps=1e-6)
    with pytest.raises(RuntimeError, match="scalar outside its range"):
        rms_norm(torch.zeros(2, 4), torch.ones(4), eps=-1.0)
