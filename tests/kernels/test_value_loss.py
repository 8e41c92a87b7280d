"""value_loss against float64, and the pitfalls that are its own."""

import ppomax_kernels as K
import pytest
import torch
from hypothesis import given

from . import strategies, verify
from .backends import Backend
from .cases import VALUE, Tokens
from .contract import all_zero, same_bits


@pytest.mark.parametrize("case", VALUE, ids=str)
def test_oracle(impl: Backend, case: Tokens) -> None:
    verify.value_loss(impl.bind(K.value_loss), case, impl.device)


@given(case=strategies.tokens())
def test_drawn(impl: Backend, case: Tokens) -> None:
    verify.value_loss(impl.bind(K.value_loss), case, impl.device)


def test_first_minibatch(impl: Backend) -> None:
    """Where values are still the old ones, the clipped loss is the unclipped one, to the bit."""
    x = Tokens((500,), "far", "some").draw(impl.device)
    results = []
    for clip in (0.2, None):
        v = verify.leaf(x["first"])
        loss, metrics = K.value_loss(v, x["first"].clone(), x["returns"], x["mask"], clip=clip, impl=impl.name)
        results.append((loss, metrics.tensor, torch.autograd.grad(loss, v)[0]))
    for what, a, b in zip(("loss", "metrics", "dvalues"), *results, strict=True):
        same_bits(what, a, b)


def test_a_rounding_within_the_clip_decides_nothing(impl: Backend) -> None:
    """old + (v - old) is v but for a rounding: it must neither count as clipped nor drop the gradient."""
    g = torch.Generator().manual_seed(0)
    old = (3.0 * torch.randn(4096, generator=g, dtype=torch.float64)).float().to(impl.device)
    v = (1e-2 * torch.randn(4096, generator=g, dtype=torch.float64)).float().to(impl.device)
    assert bool((old + (v - old) != v).any())
    returns = v + 1.0
    v = v.requires_grad_()
    loss, metrics = K.value_loss(v, old, returns, clip=100.0, impl=impl.name)
    assert metrics.to_dict()["clipfrac"] == 0.0
    (d,) = torch.autograd.grad(loss, v)
    assert bool((d != 0).all())


@pytest.mark.parametrize("count", [0, 1, 5])
def test_nothing_kept(impl: Backend, count: int) -> None:
    v = torch.full((count,), torch.nan, device=impl.device).requires_grad_()
    other = torch.full((count,), torch.nan, device=impl.device)
    loss, metrics = K.value_loss(
        v, other, other, torch.zeros(count, dtype=torch.uint8, device=impl.device), impl=impl.name
    )
    all_zero("loss", loss)
    all_zero("metrics", metrics.tensor)
    all_zero("gradient", torch.autograd.grad(loss, v)[0])


@pytest.mark.parametrize("clip", [None, 0.3])
def test_gradcheck_of_the_reference(clip: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    v, old, target = (torch.randn(12, generator=g, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda x: K.value_loss(x, old, target, clip=clip, impl="ref")[0], (v.requires_grad_(),)
    )
