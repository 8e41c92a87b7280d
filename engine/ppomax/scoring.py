"""Packed forwards that give what PPO compares: log-probabilities, entropies, values. Rollout scoring and the update both
call these, with the same micro-batches, so that the first minibatch's ratio is 1.

Only the states that produced a response token go through the head, so a prompt costs no logits."""

from __future__ import annotations

import ppomax_kernels as K
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.models import Critic, Head, head_of, packed_hidden


def state_hidden(policy: PreTrainedModel, tokens: Tensor, cu_seqlens: Tensor, states: Tensor) -> Tensor:
    """`packed_hidden(policy, tokens, cu_seqlens)[states]`: (N, D), what the head turns into each response token."""
    return packed_hidden(policy, tokens, cu_seqlens).index_select(0, states)


def head_logprobs(hidden: Tensor, head: Head, labels: Tensor, *, temperature: float = 1.0, entropy: bool = False,
                  impl: str = "auto") -> tuple[Tensor, Tensor | None]:
    """`log_softmax(head.logits(hidden) / temperature)[labels]` (N,) fp32, and the entropy (N,) or None; differentiable."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    if head.scale != 1.0:
        logits = logits * head.scale
    out = K.token_logprobs(logits, labels, temperature=temperature, softcap=head.softcap, return_entropy=entropy, impl=impl)
    return out if entropy else (out, None)


def policy_logprobs(policy: PreTrainedModel, tokens: Tensor, cu_seqlens: Tensor, states: Tensor, *,
                    temperature: float = 1.0, entropy: bool = False, impl: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Logprobs (N,) of `tokens[states + 1]`, each given all before it in its sequence, and entropies (N,) or None."""
    hidden = state_hidden(policy, tokens, cu_seqlens, states)
    return head_logprobs(hidden, head_of(policy), tokens[states + 1], temperature=temperature, entropy=entropy, impl=impl)


def state_values(critic: Critic, tokens: Tensor, cu_seqlens: Tensor, states: Tensor) -> Tensor:
    """V(s_t) (N,) fp32, read at the token before each response token."""
    hidden = packed_hidden(critic.model, tokens, cu_seqlens)
    return critic.values_of(hidden.index_select(0, states))
