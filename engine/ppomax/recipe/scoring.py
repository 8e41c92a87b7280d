"""Packed forwards that give what PPO compares: log-probabilities, entropies, values. Rollout scoring and the update
both call these, with the same micro-batches, so that the first minibatch's ratio is 1.

Only the states that produced a response token go through the head, so a prompt costs no logits."""

from __future__ import annotations

from typing import NamedTuple

import ppomax_kernels as K
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.models import Head, head_of, packed_hidden
from ppomax.models.adapter_critic import AdapterCritic, AnyCritic
from ppomax.models.branch import Branch, TrunkCritic
from ppomax.models.transfers import sent
from ppomax.recipe.batch import Trunk, trunk_cu
from ppomax.recipe.cut import cut_logprobs
from ppomax.recipe.vocabulary_kl import vocabulary_kl


def state_hidden(
    policy: PreTrainedModel | Branch, tokens: Tensor, cu_seqlens: Tensor, states: Tensor, trunk: Trunk | None = None
) -> Tensor:
    """`packed_hidden(policy, tokens, cu_seqlens)[states]`: (N, D), what the head turns into each response token.

    With `trunk`, of these very sequences, only the blocks above it run; a Branch cannot do without."""
    if trunk is None:
        if isinstance(policy, Branch):
            raise ValueError(
                f"state_hidden: a Branch starts from what enters block {policy.layers}; pass trunk= "
                "(Rollout.trunk, Minibatch.trunk)"
            )
        return packed_hidden(policy, tokens, cu_seqlens).index_select(0, states)
    branch = policy if isinstance(policy, Branch) else Branch(policy, trunk.layers)
    if branch.layers != trunk.layers:
        raise ValueError(f"state_hidden: the branch starts at block {branch.layers}, the trunk ends at {trunk.layers}")
    hidden = branch(trunk.states, trunk_cu(cu_seqlens))
    ends = sent(cu_seqlens, states.device)[1:]
    sequence = torch.searchsorted(ends, states, right=True)  # one token less in each sequence before it
    return hidden.index_select(0, states - sequence)


def head_logprobs(
    hidden: Tensor, head: Head, labels: Tensor, *, temperature: float = 1.0, entropy: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """`log_softmax(head.logits(hidden) / temperature)[labels]` (N,) fp32, and the entropy (N,) or None;
    differentiable."""
    hidden, bias = head.scaled(hidden)
    out = K.linear_token_logprobs(
        hidden,
        head.weight,
        labels,
        bias=bias,
        temperature=temperature,
        softcap=head.softcap,
        return_entropy=entropy,
        kept=len(labels),
        impl=impl,
    )
    return out if isinstance(out, tuple) else (out, None)


class Against(NamedTuple):
    """Another model's view of the same states, to which a KL is taken."""

    hidden: Tensor
    """(N, D), what its head reads."""
    head: Head


class Scored(NamedTuple):
    """What a language model says of response tokens, each given all before it in its sequence."""

    logprobs: Tensor
    """(N,) float32."""
    entropy: Tensor | None
    """(N,) float32; None: not asked for."""
    untempered: Tensor | None
    """(N,) float32 logprobs at temperature 1; None: that is the temperature."""
    kl: Tensor | None
    """(N,) float32, KL of the other model to this one over the whole vocabulary; None: there is no other."""
    hidden: Tensor
    """(N, D), what the head read."""


def score_states(
    policy: PreTrainedModel | Branch,
    tokens: Tensor,
    cu_seqlens: Tensor,
    states: Tensor,
    trunk: Trunk | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    kept: Tensor | None = None,
    against: Against | None = None,
    impl: str = "auto",
) -> Scored:
    """Of `tokens[states + 1]`. kept: over these tokens alone (rollout/kept.py)."""
    hidden = state_hidden(policy, tokens, cu_seqlens, states, trunk)
    head, labels = lm_head_of(policy), tokens[states + 1]

    def at(temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
        if kept is not None:
            return cut_logprobs(hidden, head, labels, kept, temperature)
        return head_logprobs(hidden, head, labels, temperature=temperature, entropy=entropy, impl=impl)

    logprobs, found = at(temperature, entropy)
    untempered = None if temperature == 1.0 else at(1.0, False)[0]
    kl = None
    if against is not None:
        kl = vocabulary_kl(*against, hidden, head, kept=kept, temperature=temperature)
    return Scored(logprobs, found, untempered, kl, hidden)


def lm_head_of(policy: PreTrainedModel | Branch) -> Head:
    """The head that turns a policy's or a reference's states into logits."""
    head = policy.head if isinstance(policy, Branch) else head_of(policy)
    if head is None:
        raise ValueError("scoring: this branch has no language-model head; give the policy's or the reference's")
    return head


def state_values(
    critic: AnyCritic, tokens: Tensor, cu_seqlens: Tensor, states: Tensor, trunk: Trunk | None = None
) -> Tensor:
    """V(s_t) (N,) fp32, read at the token before each response token. A TrunkCritic reads `trunk`, others do not."""
    if isinstance(critic, TrunkCritic):
        return critic.values_of(state_hidden(critic.branch, tokens, cu_seqlens, states, trunk))
    if isinstance(critic, AdapterCritic):
        return critic.values_of(critic.hidden(tokens, cu_seqlens).index_select(0, states))
    return critic.values_of(state_hidden(critic.model, tokens, cu_seqlens, states))
