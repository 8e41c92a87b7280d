"""One small valid call of every public op, by argument name: what tests of errors, registration and determinism start
from."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import ppomax_kernels as K
import torch
from torch import Tensor

from .backends import Backend
from .verify import leaf

Arguments = dict[str, Any]


def arguments(device: str = "cpu", n: int = 12) -> dict[str, Arguments]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    mask = (torch.arange(n) % 5 != 1).to(device)
    ends = torch.tensor([0, n // 3, n], dtype=torch.int32, device=device)
    labels = torch.randint(67, (n,), generator=g)
    labels[2] = -100
    labels = labels.to(device)
    old, ref = normal(n) - 4, normal(n) - 4
    policy = dict(
        old_logprobs=old, advantages=normal(n), mask=mask, dual_clip=3.0, ref_logprobs=ref, kl_coef=0.1, ent_coef=0.01
    )
    head = dict(hidden=normal(n, 16), weight=normal(67, 16), labels=labels, bias=normal(67), chunk_tokens=5)
    return {
        "token_logprobs": dict(logits=3 * normal(n, 67), labels=labels, temperature=0.8, return_entropy=True),
        "kl_penalty": dict(logprobs=old + 0.3 * normal(n), ref_logprobs=ref, estimator="k3"),
        "token_rewards": dict(
            scores=normal(2), logprobs=old, ref_logprobs=ref, cu_seqlens=ends, kl_coef=0.1, estimator="k3"
        ),
        "gae": dict(
            rewards=normal(n), values=normal(n), cu_seqlens=ends, mask=mask, gamma=0.99, lam=0.9, bootstrap=normal(2)
        ),
        "whiten": dict(x=normal(n), mask=mask),
        "ppo_loss": dict(logprobs=old + 0.3 * normal(n), **policy, entropy=normal(n).abs()),
        "value_loss": dict(values=normal(n), old_values=normal(n), returns=normal(n), mask=mask),
        "linear_token_logprobs": dict(**head, return_entropy=True),
        "linear_ppo_loss": dict(**head, **policy),
        "linear_nll": dict(**head),
        "sample": dict(
            logits=3 * normal(4, 67),
            seeds=torch.arange(4, device=device),
            positions=torch.arange(4, device=device) * 7,
            temperature=0.8,
            top_k=20,
            top_p=0.9,
        ),
    }


# The arguments that gradients flow to.
WANTS = {
    "token_logprobs": ("logits",),
    "kl_penalty": ("logprobs", "ref_logprobs"),
    "ppo_loss": ("logprobs", "entropy"),
    "value_loss": ("values",),
    "linear_token_logprobs": ("hidden", "weight", "bias"),
    "linear_ppo_loss": ("hidden", "weight", "bias"),
    "linear_nll": ("hidden", "weight", "bias"),
}
DIFFERENTIABLE = tuple(WANTS)


def flat(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, K.Metrics):
        return [out.tensor]
    return [t for x in out for t in flat(x)]


@dataclass(frozen=True)
class Call:
    op: str
    impl: Backend
    n: int = 12

    def forward(self, function: Callable[..., Any] | None = None, **changed: Any) -> list[Tensor]:
        given = {**arguments(self.impl.device, self.n)[self.op], **changed}
        return flat((function or getattr(K, self.op))(**given, impl=self.impl.name))

    def both(
        self,
        function: Callable[..., Any] | None = None,
        within: AbstractContextManager[Any] | None = None,
        **changed: Any,
    ) -> list[Tensor]:
        """Outputs and gradients of the differentiable arguments, upstream gradients being 1, 2, 3 ... for each output.
        The forward runs within the given context."""
        given = {**arguments(self.impl.device, self.n)[self.op], **changed}
        wanted = {name: leaf(given[name]) for name in WANTS.get(self.op, ()) if given.get(name) is not None}
        with within or nullcontext():
            out = flat((function or getattr(K, self.op))(**{**given, **wanted}, impl=self.impl.name))
        if not wanted:
            return out
        live = [x for x in out if x.requires_grad]
        up = [torch.full_like(x, i + 1.0) for i, x in enumerate(live)]
        return [*(x.detach() for x in out), *torch.autograd.grad(live, list(wanted.values()), up)]
