"""A level above single ops: ten PPO steps of a tiny policy and critic, every op of the path in them, give the same
losses and weights with the fused ops as with plain torch. The truth is the reference in float64, the yardstick the
reference in float32."""

from typing import Any

import ppomax_kernels as K
import pytest
import torch
from torch import Tensor

from .backends import Backend
from .contract import f64, hold

VOCAB, WIDTH, LENGTHS, STEPS = 37, 16, (7, 1, 25, 15), 10


def ten_steps(impl: str, device: str, dtype: torch.dtype, fused_head: bool) -> tuple[Tensor, Tensor]:
    """The losses of the steps, and the head's weight after them."""
    g = torch.Generator().manual_seed(3)
    n = sum(LENGTHS)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()

    embedding, head, critic = parameter(VOCAB, WIDTH), parameter(VOCAB, WIDTH), parameter(WIDTH)
    tokens, labels = (torch.randint(VOCAB, (n,), generator=g).to(device) for _ in range(2))
    scores = torch.randn(len(LENGTHS), generator=g, dtype=torch.float64).to(device, dtype)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    optimizer = torch.optim.SGD([embedding, head, critic], lr=0.05, momentum=0.9)

    def forward() -> tuple[Tensor, Tensor, Any]:
        hidden = torch.tanh(embedding[tokens])
        return hidden, hidden @ critic, K.token_logprobs(hidden @ head.T, labels, return_entropy=True, impl=impl)

    with torch.no_grad():
        _, old_values, (old, _) = forward()
        reference = old - 0.1 * torch.sin(torch.arange(n, device=device, dtype=dtype))
        rewards = K.token_rewards(scores, old, reference, ends, kl_coef=0.05, impl=impl)
        advantages, returns = K.gae(rewards, old_values, ends, gamma=0.99, lam=0.95, impl=impl)
        advantages = K.whiten(advantages, impl=impl)
        advantages, returns, old = (x.to(dtype) for x in (advantages, returns, old))
    losses = []
    for _ in range(STEPS):
        hidden, values, (logprobs, entropy) = forward()
        settings = dict(clip_high=0.28, dual_clip=3.0, ref_logprobs=reference, kl_coef=0.05, ent_coef=0.01, impl=impl)
        if fused_head:
            policy, _ = K.linear_ppo_loss(hidden, head, labels, old, advantages, chunk_tokens=16, **settings)
        else:
            policy, _ = K.ppo_loss(logprobs, old, advantages, entropy=entropy, **settings)
        value, _ = K.value_loss(values, old_values, returns, impl=impl)
        loss = policy + 0.5 * value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), head.detach()


@pytest.mark.parametrize("fused_head", [False, True], ids=["ops", "linear_ppo_loss"])
def test_same_losses(impl: Backend, fused_head: bool) -> None:
    if impl.interpreted and fused_head:
        pytest.skip("triton: the same kernels as without the fused head, and slow in the interpreter")
    truth = ten_steps("ref", impl.device, torch.float64, fused_head)
    yard = ten_steps("ref", impl.device, torch.float32, fused_head)
    got = ten_steps("auto" if impl.name == "cuda" else impl.name, impl.device, torch.float32, fused_head)
    assert f64(truth[0])[-1] < f64(truth[0])[0], "the loss does not fall: nothing is trained here"
    for what, a, t, y in zip(("losses", "head"), got, truth, yard, strict=True):
        hold(f"{what} of {STEPS} steps", a, f64(t), y)
