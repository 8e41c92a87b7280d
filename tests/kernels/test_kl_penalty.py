"""kl_penalty against float64."""

import ppomax_kernels as K
import pytest
import torch
from hypothesis import given
from ppomax_kernels.kl_penalty import ESTIMATORS

from . import strategies, verify
from .backends import Backend
from .cases import KL, Tokens
from .contract import all_zero, same_bits


@pytest.mark.parametrize("case", KL, ids=str)
def test_oracle(impl: Backend, case: Tokens) -> None:
    verify.kl_penalty(impl.bind(K.kl_penalty), case, impl.device)


@given(case=strategies.tokens())
def test_drawn(impl: Backend, case: Tokens) -> None:
    verify.kl_penalty(
        impl.bind(K.kl_penalty),
        Tokens(case.shape, case.style, "none", case.dtype, estimator=case.estimator, seed=case.seed),
        impl.device,
    )


def test_clamp_passes_no_gradient(impl: Backend) -> None:
    logprobs = torch.tensor([-30.0, -0.5, 30.0, -float("inf")], device=impl.device).requires_grad_()
    kl = K.kl_penalty(logprobs, torch.zeros(4, device=impl.device), estimator="k3", impl=impl.name)
    assert bool(torch.isfinite(kl).all())
    (d,) = torch.autograd.grad(kl.sum(), logprobs)
    all_zero("outside +-20", d[[0, 2, 3]])
    assert d[1].item() != 0.0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_cut_gives_the_same_bits(impl: Backend, estimator: str) -> None:
    """Vector loop or tail, aligned or not: a token's result depends on the token alone."""
    x = Tokens((101,), "far", seed=5).draw(impl.device)
    a, b = x["first"], x["reference"]
    whole = K.kl_penalty(a, b, estimator=estimator, impl=impl.name)
    for cut in (slice(0, 1), slice(3, 20), slice(1, 101), slice(96, 101)):
        same_bits(f"{cut}", K.kl_penalty(a[cut], b[cut], estimator=estimator, impl=impl.name), whole[cut])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck_of_the_reference(estimator: str) -> None:
    g = torch.Generator().manual_seed(0)
    pair = [torch.randn(9, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: K.kl_penalty(a, b, estimator=estimator, impl="ref"), pair)
