"""ppo_loss against float64, and the pitfalls that are its own."""

import ppomax_kernels as K
import pytest
import torch
from hypothesis import given

from . import strategies, verify
from .backends import Backend
from .cases import POLICY, Tokens
from .contract import all_zero, f64, hold, same_bits


@pytest.mark.parametrize("case", POLICY, ids=str)
def test_oracle(impl: Backend, case: Tokens) -> None:
    verify.ppo_loss(impl.bind(K.ppo_loss), case, impl.device)


@given(case=strategies.tokens())
def test_drawn(impl: Backend, case: Tokens) -> None:
    verify.ppo_loss(impl.bind(K.ppo_loss), case, impl.device)


def test_first_minibatch(impl: Backend) -> None:
    """The policy that generated: every ratio is 1 to the bit, nothing is clipped, approx_kl is 0."""
    x = Tokens((500,), "same", "some", clip_low=0.0, clip_high=0.0).draw(impl.device)
    _, metrics = K.ppo_loss(
        x["first"], x["first"], x["advantages"], x["mask"], clip_low=0.0, clip_high=0.0, impl=impl.name
    )
    figures = metrics.to_dict()
    assert figures["ratio_max"] == 1.0
    assert [figures[k] for k in ("approx_kl", "clipfrac", "dual_clipfrac")] == [0.0] * 3


def test_ratio_overflow(impl: Backend) -> None:
    """The log-ratio is clamped to +-20, without gradient; a logprob of -inf (label on a masked logit) stays finite."""
    logp = torch.tensor([0.0, -200.0, -float("inf"), -1.0], device=impl.device).requires_grad_()
    old = torch.tensor([-100.0, 0.0, -1.0, -1.0], device=impl.device)
    for sign in (1.0, -1.0):
        loss, metrics = K.ppo_loss(logp, old, torch.full_like(old, sign), impl=impl.name)
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(metrics.tensor).all())
        (d,) = torch.autograd.grad(loss, logp)
        all_zero("beyond the clamp", d[:3])
        assert d[3].item() == -sign / 4


@pytest.mark.parametrize("count", [0, 1, 5])
def test_nothing_kept(impl: Backend, count: int) -> None:
    logp = torch.full((count,), torch.nan, device=impl.device).requires_grad_()
    ent = torch.full((count,), torch.nan, device=impl.device).requires_grad_()
    dead = torch.zeros(count, dtype=torch.bool, device=impl.device)
    other = torch.full((count,), torch.nan, device=impl.device)
    loss, metrics = K.ppo_loss(
        logp,
        other,
        other,
        dead,
        entropy=ent,
        ent_coef=0.1,
        ref_logprobs=other,
        kl_coef=0.1,
        dual_clip=3.0,
        is_weights=other,
        impl=impl.name,
    )
    all_zero("loss", loss)
    all_zero("metrics", metrics.tensor)
    for d in torch.autograd.grad(loss, [logp, ent]):
        all_zero("gradient", d)


def test_micro_batches_add_up(impl: Backend) -> None:
    """With one normalizer the losses and gradients of parts are those of the whole."""
    x = Tokens((64,), "far", "some", seed=8).draw(impl.device)
    total = x["mask"].bool().sum().float()
    logp = verify.leaf(x["first"])
    whole, _ = K.ppo_loss(logp, x["old"], x["advantages"], x["mask"], normalizer=total, impl=impl.name)
    (d,) = torch.autograd.grad(whole, logp)
    parts = []
    for cut in (slice(0, 10), slice(10, 11), slice(11, 64)):
        part = verify.leaf(x["first"][cut])
        loss, _ = K.ppo_loss(
            part, x["old"][cut], x["advantages"][cut], x["mask"][cut], normalizer=total, impl=impl.name
        )
        (dpart,) = torch.autograd.grad(loss, part)
        same_bits(f"gradient of {cut}", dpart, d[cut])
        parts.append(loss.double())
    hold("sum of parts", torch.stack(parts).sum().float(), f64(whole), whole)


@pytest.mark.parametrize("upstream", [0.0, -2.0, 4096.0])
def test_upstream(impl: Backend, upstream: float) -> None:
    """A scalar upstream that is not 1 (a loss scale, an accumulation share) multiplies through, to the bit for powers
    of two and 0."""
    x = Tokens((20,), "near").draw(impl.device)
    both = []
    for scale in (1.0, upstream):
        logp = verify.leaf(x["first"])
        loss, _ = K.ppo_loss(logp, x["old"], x["advantages"], impl=impl.name)
        both.append(torch.autograd.grad(loss * scale, logp)[0])
    same_bits("scaled", both[1] + 0.0, both[0] * upstream + 0.0)


def test_gradcheck_of_the_reference() -> None:
    g = torch.Generator().manual_seed(0)
    logp, old, a, ref, ent, w = (torch.randn(12, generator=g, dtype=torch.float64) for _ in range(6))
    mask = torch.arange(12) % 4 != 0

    def run(logp: torch.Tensor, ent: torch.Tensor) -> torch.Tensor:
        return K.ppo_loss(
            logp,
            old,
            a,
            mask,
            dual_clip=2.0,
            is_weights=w.abs(),
            ref_logprobs=ref,
            kl_coef=0.2,
            entropy=ent,
            ent_coef=0.1,
            impl="ref",
        )[0]

    assert torch.autograd.gradcheck(run, (logp.requires_grad_(), ent.requires_grad_()))
