"""rotate on every instruction set against float64: result and gradient, over widths that fill no register."""

from __future__ import annotations

import pytest
import torch
from ppomax_kernels.internal.rotate import rotate
from torch import Tensor


def formula(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cosine.unsqueeze(1) + turned * sine.unsqueeze(1)


@pytest.mark.parametrize("dim", [2, 6, 32, 34, 128])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_formula_and_its_gradient(dim: int, batch: int, shared: bool, isa: int) -> None:
    """The two halves of the angles are not the same here, as they are in a model."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(batch, 5, 7, dim, generator=generator).transpose(1, 2)  # as a model's heads lie
    cosine, sine = torch.randn(2, 1 if shared else batch, 5, dim, generator=generator)
    up = torch.randn(batch, 7, 5, dim, generator=generator)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = rotate(leaf, cosine, sine), formula(exact, cosine.double(), sine.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(rotate(x, cosine, sine), got)
    assert got.transpose(1, 2).is_contiguous()
    gradients = torch.autograd.grad(got, leaf, up)[0], torch.autograd.grad(want, exact, up.double())[0]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-6, atol=1e-6)


def test_strides_and_threads_change_nothing() -> None:
    x, before = torch.randn(2, 3, 40, 16), torch.get_num_threads()
    cosine, sine = torch.randn(2, 1, 40, 16)
    alone = rotate(x, cosine, sine)
    try:
        torch.set_num_threads(2)
        assert torch.equal(rotate(x, cosine, sine), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rotate(x[:, :1].expand(-1, 3, -1, -1), cosine, sine), alone[:, :1].expand(-1, 3, -1, -1))
    assert torch.equal(rotate(x.transpose(2, 3).contiguous().transpose(2, 3), cosine, sine), alone)
    assert rotate(x[:0], cosine, sine).shape == (0, 3, 40, 16)


def test_bad_arguments_are_named() -> None:
    x, angles = torch.zeros(2, 3, 4, 6), torch.zeros(1, 4, 6)
    short, odd = angles[:, :3], angles[..., :5]
    for bad in ((x[0], angles, angles), (x, short, short), (x[..., :5], odd, odd)):
        with pytest.raises(ValueError, match=r"rotate: x must be \(B, H, T, D\) with an even D"):
            rotate(*bad)
    with pytest.raises(ValueError, match="rotate: float32 on the CPU is wanted"):
        rotate(x.double(), angles, angles)
