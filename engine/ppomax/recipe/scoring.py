"""Packed forwards that give what PPO compares: log-probabilities, entropies, values. Rollout scoring and the update
both call these, with the same micro-batches, so that the first minibatch's ratio is 1.

Only the states that produced a response token go through the head, so a prompt costs no logits."""

from __future__ import annotations

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
    hidden, bias = scaled(hidden, head)
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


def scaled(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Hidden states and bias with the head's logit scale put into them, as the linear kernels take them."""
    if head.scale == 1.0:
        return hidden, head.bias
    return hidden * head.scale, None if head.bias is None else head.bias * head.scale


def policy_logprobs(
    policy: PreTrainedModel | Branch,
    tokens: Tensor,
    cu_seqlens: Tensor,
    states: Tensor,
    trunk: Trunk | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    kept: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Logprobs (N,) of `tokens[states + 1]`, each given all before it in its sequence, and entropies (N,) or None.
    kept: over these tokens alone (rollout/kept.py)."""
    hidden = state_hidden(policy, tokens, cu_seqlens, states, trunk)
    head = policy.head if isinstance(policy, Branch) else head_of(policy)
    if head is None:
        raise ValueError(
            "policy_logprobs: this branch has no language-model head; give the policy's or the reference's"
        )
    if kept is not None:
        return cut_logprobs(hidden, head, tokens[states + 1], kept, temperature)
    return head_logprobs(hidden, head, tokens[states + 1], temperature=temperature, entropy=entropy, impl=impl)


def state_values(
    critic: AnyCritic, tokens: Tensor, cu_seqlens: Tensor, states: Tensor, trunk: Trunk | None = None
) -> Tensor:
    """V(s_t) (N,) fp32, read at the token before each response token. A TrunkCritic reads `trunk`, others do not."""
    if isinstance(critic, TrunkCritic):
        return critic.values_of(state_hidden(critic.branch, tokens, cu_seqlens, states, trunk))
    if isinstance(critic, AdapterCritic):
        return critic.values_of(critic.hidden(tokens, cu_seqlens).index_select(0, states))
    return critic.values_of(state_hidden(critic.model, tokens, cu_seqlens, states))
