"""Generate, pack, score: policy, reference and critic each see the finished sequences once, in the micro-batches that
training will use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.batch import Plan, Rollout, cumulative, last_tokens, pack, plan_minibatches, spans
from ppomax.config import BatchConfig, RolloutConfig
from ppomax.models import Critic
from ppomax.rollout.decode import Responses, decode
from ppomax.scoring import policy_logprobs, state_values


@torch.no_grad()
def rollout(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    critic: Critic,
    prompts: Sequence[Sequence[int]],
    *,
    config: RolloutConfig,
    batch: BatchConfig,
    eos_ids: Sequence[int],
    uids: Sequence[int],
    seed: int,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Rollout:
    """One response to each prompt (token ids), scored. `generator` shuffles sequences into minibatches."""
    responses = decode(
        policy,
        prompts,
        uids,
        eos_ids=eos_ids,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=seed,
        batch_size=config.batch_size,
        impl=impl,
    )
    lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses.tokens, strict=True)])
    plan = plan_minibatches(lengths, batch.minibatch_size, batch.micro_tokens, generator)
    return score(policy, reference, critic, prompts, responses, plan, temperature=config.temperature, impl=impl)


@torch.no_grad()
def score(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    critic: Critic,
    prompts: Sequence[Sequence[int]],
    responses: Responses,
    plan: Plan,
    *,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Rollout:
    """Pack prompts with responses (from any sampler) and score them micro-batch by micro-batch of `plan`."""
    device = policy.device
    rows = [list(p) + list(r) for p, r in zip(prompts, responses.tokens, strict=True)]
    tokens, cu = pack(rows, device)
    response_cu = cumulative(torch.tensor([len(r) for r in responses.tokens])).to(device)
    states = _states(cu, response_cu)
    sampled = torch.tensor([x for row in responses.logprobs for x in row], dtype=torch.float32, device=device)
    count = len(states)
    logprobs, entropy, ref_logprobs, values = (torch.empty(count, device=device) for _ in range(4))
    for micro in (m for minibatch in plan for m in minibatch):
        which = micro.to(device)
        at, micro_cu = spans(cu, which)
        slots, micro_response_cu = spans(response_cu, which)
        packed, micro_states = tokens[at], _states(micro_cu, micro_response_cu)
        logprobs[slots], entropy[slots] = policy_logprobs(  # type: ignore[assignment]
            policy, packed, micro_cu, micro_states, temperature=temperature, entropy=True, impl=impl
        )
        ref_logprobs[slots], _ = policy_logprobs(
            reference, packed, micro_cu, micro_states, temperature=temperature, impl=impl
        )
        values[slots] = state_values(critic, packed, micro_cu, micro_states)
    return Rollout(
        tokens=tokens,
        cu_seqlens=cu,
        response_cu=response_cu,
        states=states,
        finished=torch.tensor(responses.finished, device=device),
        sampler_logprobs=sampled,
        logprobs=logprobs,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        values=values,
        plan=plan,
    )


def _states(cu: Tensor, response_cu: Tensor) -> Tensor:
    """(N,) index of the state before each response token, given that a response is the tail of its sequence."""
    lengths = response_cu.diff().long()
    first = last_tokens(cu) - lengths  # the token before the response's first
    shift = torch.repeat_interleave(first - response_cu[:-1].long(), lengths)
    return torch.arange(len(shift), device=cu.device) + shift
