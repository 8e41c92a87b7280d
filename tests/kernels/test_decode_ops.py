"""The small ops of a decoding layer in Triton, against their formulas in float32: norm, norm of a sum, gate, rotary
embedding; ragged widths, and the strided columns of a joined product that they are given."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from ppomax_kernels.dispatch import triton_interprets
from ppomax_kernels.internal.gated_mul import ACTIVATIONS, gated_mul
from ppomax_kernels.internal.rms_norm import add_rms_norm, rms_norm
from ppomax_kernels.internal.rotate import rotate_pair
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton_interprets():
    pytest.skip("neither a CUDA device nor Triton's interpreter", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative, and beside 1: one rounding to the dtype, which the interpreter makes towards zero."""


def near(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.float(), want.float(), rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype])


def draw(*size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def norm(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight.float() + offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 20, 96, 128, 1025])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm(width: int, offset: float, dtype: torch.dtype) -> None:
    x, weight = draw(2, 7, width, dtype=dtype), draw(width, dtype=dtype, seed=1)
    got = rms_norm(x, weight, offset=offset, eps=1e-5, impl="triton")
    assert got.dtype == dtype
    assert near(got, norm(x, weight, offset))
    assert not near(got, norm(x, weight, offset + 0.02))


@pytest.mark.parametrize("shape", [(1, 5, 3, 20), (5, 3, 20)])
def test_norm_of_heads_that_are_columns_of_a_product(shape: tuple[int, ...]) -> None:
    wide = draw(5, 100, dtype=torch.float32)
    heads = wide[:, 20:80].view(shape)
    weight = draw(20, dtype=torch.float32, seed=1)
    assert not heads.is_contiguous()
    assert near(rms_norm(heads, weight, eps=1e-5, impl="triton"), norm(heads, weight, 0.0))
    across = wide.view(5, 5, 20).transpose(0, 1)
    assert near(rms_norm(across, weight, eps=1e-5, impl="triton"), norm(across, weight, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [20, 1025])
def test_norm_of_a_sum(width: int, dtype: torch.dtype) -> None:
    x, delta, weight = (draw(1, 7, width, dtype=dtype, seed=i) for i in range(3))
    total, got = add_rms_norm(x, delta, weight[0, 0], offset=1.0, eps=1e-5, impl="triton")
    assert near(total, x + delta)
    assert near(got, norm(total, weight[0, 0], 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 48, 2049])
def test_gate(width: int, activation: str, dtype: torch.dtype) -> None:
    both = 6 * draw(1, 3, 2 * width, dtype=dtype)
    for gate, up in ((both[..., :width], both[..., width:]), (both[..., :width].contiguous(), both[..., width:])):
        got = gated_mul(gate, up, activation, impl="triton")
        assert got.dtype == dtype
        assert near(got, gated_mul(gate.float(), up.float(), activation, impl="ref"))
    assert near(gated_mul(gate, up, activation, impl="ref"), gated_mul(gate, up, activation, impl="triton"))


def test_gates_at_the_ends_of_their_range() -> None:
    x = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=DEVICE)
    for activation in ACTIVATIONS:
        got, want = (gated_mul(x, torch.ones_like(x), activation, impl=impl) for impl in ("triton", "ref"))
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-7), activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "dim", "batch"), [(5, 2, 10, 1), (4, 4, 64, 2), (6, 1, 20, 1)])
def test_rotary(heads: int, groups: int, dim: int, batch: int, dtype: torch.dtype) -> None:
    joined = draw(batch, 7, (heads + groups) * dim, dtype=dtype)
    q = joined[..., : heads * dim].view(batch, 7, heads, dim).transpose(1, 2)
    k = joined[..., heads * dim :].view(batch, 7, groups, dim).transpose(1, 2)
    for shared in (True, False):
        angles = draw(1 if shared else batch, 7, dim, dtype=torch.float32, seed=1)
        cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)

        def turned(x: Tensor, cosine: Tensor = cosine, sine: Tensor = sine) -> Tensor:
            x = x.float()
            half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
            return x * cosine.float()[:, None] + half * sine.float()[:, None]

        got = rotate_pair(q, k, cosine, sine, impl="triton")
        assert near(got[0], turned(q))
        assert near(got[1], turned(k))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: add_rms_norm(x, x[:1], x[0], eps=1e-5, impl="triton"), r"x and delta must be \(..., D\)"),
        (lambda x: gated_mul(x, x[:1], "silu", impl="triton"), r"gate and up must be \(..., D\) of one floating dtype"),
        (lambda x: gated_mul(x, x, "relu", impl="triton"), "activation must be one of .*silu.*, got 'relu'"),
        (lambda x: gated_mul(x.double(), x.double(), "silu", impl="triton"), "float64 is not served"),
        (lambda x: rotate_pair(x[None, None], x[None], x[None], x[None], impl="triton"), "rotate_pair: query must be"),
        (
            lambda x: rotate_pair(x[None, None], x[None, None], x[None].half(), x[None].half(), impl="triton"),
            "rotate_pair: one dtype is wanted",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(draw(4, 4, dtype=torch.float32))
