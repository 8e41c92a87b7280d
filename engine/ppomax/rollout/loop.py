"""Generate, pack, score: policy, reference and critic each see the finished sequences once, in the micro-batches that
training will use. What they share (a frozen trunk, or all weights but the adapters) is neither held nor run twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.adapters import adapters_off
from ppomax.batch import (
    Plan,
    Rollout,
    Trunk,
    cumulative,
    last_tokens,
    pack,
    plan_minibatches,
    select_trunk,
    spans,
    trunk_cu,
)
from ppomax.branch import Branch, TrunkCritic, bottom_states
from ppomax.config import BatchConfig, RolloutConfig
from ppomax.models import Critic, embedding_weight
from ppomax.rollout.decode import Responses, decode
from ppomax.scoring import policy_logprobs, state_values


@torch.no_grad()
def rollout(
    policy: PreTrainedModel,
    reference: PreTrainedModel | Branch | None,
    critic: Critic | TrunkCritic,
    prompts: Sequence[Sequence[int]],
    *,
    config: RolloutConfig,
    batch: BatchConfig,
    eos_ids: Sequence[int],
    uids: Sequence[int],
    seed: int,
    generator: torch.Generator | None = None,
    trunk_layers: int | None = None,
    impl: str = "auto",
) -> Rollout:
    """One response to each prompt (token ids), scored. `generator` shuffles sequences into minibatches; `reference`
    and `trunk_layers` as in `score`."""
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
    return score(
        policy,
        reference,
        critic,
        prompts,
        responses,
        plan,
        temperature=config.temperature,
        trunk_layers=trunk_layers,
        impl=impl,
    )


@torch.no_grad()
def score(
    policy: PreTrainedModel,
    reference: PreTrainedModel | Branch | None,
    critic: Critic | TrunkCritic,
    prompts: Sequence[Sequence[int]],
    responses: Responses,
    plan: Plan,
    *,
    temperature: float = 1.0,
    trunk_layers: int | None = None,
    impl: str = "auto",
) -> Rollout:
    """Pack prompts with responses (from any sampler) and score them micro-batch by micro-batch of `plan`.

    reference None: the policy with its adapters off. trunk_layers b: all but the blocks from b on is frozen; what
    enters block b is taken from the responses, or computed once if the sampler did not record it, and no scorer runs
    the blocks below."""
    device = policy.device
    rows = [list(p) + list(r) for p, r in zip(prompts, responses.tokens, strict=True)]
    tokens, cu = pack(rows, device)
    response_cu = cumulative(torch.tensor([len(r) for r in responses.tokens])).to(device)
    states = _states(cu, response_cu)
    sampled = torch.tensor([x for row in responses.logprobs for x in row], dtype=torch.float32, device=device)
    trunk = None if trunk_layers is None else _trunk(policy, responses, tokens, cu, plan, trunk_layers)
    count = len(states)
    logprobs, entropy, ref_logprobs, values = (torch.empty(count, device=device) for _ in range(4))

    def micros() -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor, Trunk | None]]]:
        """Slots in the (N,) fields, and what a scorer takes, of each micro-batch."""
        for micro in (m for minibatch in plan for m in minibatch):
            which = micro.to(device)
            at, micro_cu = spans(cu, which)
            slots, micro_response_cu = spans(response_cu, which)
            yield slots, (tokens[at], micro_cu, _states(micro_cu, micro_response_cu), select_trunk(trunk, cu, which))

    for slots, packed in micros():
        logprobs[slots], entropy[slots] = policy_logprobs(  # type: ignore[assignment]
            policy, *packed, temperature=temperature, entropy=True, impl=impl
        )
        values[slots] = state_values(critic, *packed)
    with adapters_off(policy) if reference is None else nullcontext():
        for slots, packed in micros():
            ref_logprobs[slots], _ = policy_logprobs(reference or policy, *packed, temperature=temperature, impl=impl)
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
        trunk=trunk,
    )


def _trunk(policy: PreTrainedModel, responses: Responses, tokens: Tensor, cu: Tensor, plan: Plan, layers: int) -> Trunk:
    """What enters block `layers` at all tokens but each sequence's last: recorded while decoding, or computed here."""
    recorded = getattr(responses, "trunk", None)
    if recorded is not None:
        return Trunk(layers, torch.cat(list(recorded)))
    ends = trunk_cu(cu)
    keep = torch.ones(len(tokens), dtype=torch.bool, device=cu.device).index_fill_(0, last_tokens(cu), False)
    states = torch.empty(int(ends[-1]), embedding_weight(policy).shape[1], dtype=policy.dtype, device=cu.device)
    for micro in (m for minibatch in plan for m in minibatch):
        at, micro_cu = spans(ends, micro.to(cu.device))
        states[at] = bottom_states(policy, tokens[keep][at], micro_cu, layers)
    return Trunk(layers, states)


def _states(cu: Tensor, response_cu: Tensor) -> Tensor:
    """(N,) index of the state before each response token, given that a response is the tail of its sequence."""
    lengths = response_cu.diff().long()
    first = last_tokens(cu) - lengths  # the token before the response's first
    shift = torch.repeat_interleave(first - response_cu[:-1].long(), lengths)
    return torch.arange(len(shift), device=cu.device) + shift
