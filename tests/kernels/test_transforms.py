"""What torch can do to a function: an op follows, or refuses by name, and is never silently wrong."""

import warnings
from collections.abc import Callable

import ppomax_kernels as K
import pytest
import torch
from ppomax_kernels.registry import OPS
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
LABELS = torch.tensor([0, 1, 2, 3])
ZEROS, ONES = torch.zeros(4), torch.ones(4)
WEIGHT = torch.randn(5, 3)
CU = torch.tensor([0, 1, 4], dtype=torch.int32)
SEEDS = torch.arange(4)

CALLS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, str], Tensor]]] = {
    "token_logprobs": ((4, 5), lambda x, impl: K.token_logprobs(x, LABELS, impl=impl)),
    "linear_token_logprobs": ((4, 3), lambda x, impl: K.linear_token_logprobs(x, WEIGHT, LABELS, impl=impl)),
    "linear_ppo_loss": ((4, 3), lambda x, impl: K.linear_ppo_loss(x, WEIGHT, LABELS, ZEROS, ONES, impl=impl)[0]),
    "linear_nll": ((4, 3), lambda x, impl: K.linear_nll(x, WEIGHT, LABELS, impl=impl)[0]),
    "kl_penalty": ((4,), lambda x, impl: K.kl_penalty(x, ZEROS, impl=impl)),
    "token_rewards": ((2,), lambda x, impl: K.token_rewards(x, ZEROS, ONES, CU, kl_coef=0.1, impl=impl)),
    "gae": ((4,), lambda x, impl: K.gae(x, ZEROS, CU, impl=impl)[0]),
    "whiten": ((4,), lambda x, impl: K.whiten(x, impl=impl)),
    "ppo_loss": ((4,), lambda x, impl: K.ppo_loss(x, ZEROS, ONES, impl=impl)[0]),
    "value_loss": ((4,), lambda x, impl: K.value_loss(x, ZEROS, ONES, impl=impl)[0]),
    "sample": ((4, 5), lambda x, impl: K.sample(x, SEEDS, SEEDS, impl=impl)[1]),
}
DIFFERENTIABLE = ("token_logprobs", "linear_token_logprobs", "linear_ppo_loss", "linear_nll", "kl_penalty", "ppo_loss",
                  "value_loss")  # fmt: skip
REFUSED = "(kernels have reverse-mode gradients alone.*impl='ref'|no gradient flows through)"
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda y: f(y).sum()))(torch.stack([x, 2 * x])),
}


def given(op: str) -> Tensor:
    return 0.05 * torch.randn(CALLS[op][0], generator=torch.Generator().manual_seed(1))


def test_every_op_is_here() -> None:
    assert set(CALLS) == set(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_kernel_under_a_transform_is_refused_by_name(op: str, transform: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=f"^{op}: {REFUSED}"):
        TRANSFORMS[transform](lambda x: CALLS[op][1](x, "auto"), given(op))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_dual_tensor_is_refused_by_name(op: str, requires_grad: bool) -> None:
    x = given(op)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), torch.ones_like(x))
        with pytest.raises((RuntimeError, ValueError), match=f"^{op}: {REFUSED}"):
            CALLS[op][1](dual, "auto")
    CALLS[op][1](x, "auto")


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_the_reference_follows_every_transform(op: str) -> None:
    """Forward mode against reverse mode, vmap against a loop, grad against backward."""

    def f(x: Tensor) -> Tensor:
        return CALLS[op][1](x, "ref")

    x = given(op)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    value, along = torch.func.jvp(f, (x,), (tangent,))
    (back,) = torch.func.vjp(f, x)[1](torch.ones_like(value))
    torch.testing.assert_close(along.sum().float(), (back * tangent).sum(), rtol=1e-3, atol=1e-5)
    leaf = x.clone().requires_grad_()
    f(leaf).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda y: f(y).sum())(x), leaf.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = torch.vmap(f)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(both, torch.stack([f(x), f(2 * x)]))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_second_derivative_of_a_kernel_is_refused(op: str) -> None:
    x = given(op).requires_grad_()
    (first,) = torch.autograd.grad(CALLS[op][1](x, "auto").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"has first derivatives alone.*impl='ref'"):
        (first.square().sum() + x.sum()).backward()  # a second term, beside which a constant would go unseen


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(op: str, use_reentrant: bool) -> None:
    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        x = given(op).requires_grad_()
        run(x * 1.5).sum().backward()
        assert x.grad is not None
        return x.grad

    def f(x: Tensor) -> Tensor:
        return CALLS[op][1](x, "auto")

    assert torch.equal(gradient(lambda x: checkpoint(f, x, use_reentrant=use_reentrant)), gradient(f))
