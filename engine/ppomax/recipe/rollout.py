"""Generate, pack, score: policy, reference and critic each see the finished sequences once, in the micro-batches that
training will use. Under several ranks each generates and scores its share, and all end up with the whole rollout, so
that what follows (moments, whitening, plans) is that of one process. What models share (a frozen trunk, or all weights
but the adapters) is neither held nor run twice."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.config import BatchConfig, RolloutConfig
from ppomax.models import Critic, embedding_weight
from ppomax.models.adapters import adapters_off
from ppomax.models.branch import Branch, TrunkCritic, bottom_states
from ppomax.recipe.batch import (
    MicroBatches,
    Rollout,
    Trunk,
    cumulative,
    last_tokens,
    pack,
    select_trunk,
    spans,
    split_minibatches,
    trunk_cu,
    with_stand_in,
)
from ppomax.recipe.scoring import policy_logprobs, state_values
from ppomax.rollout.decode import Responses, decode
from ppomax.rollout.sizes import RolloutPlan
from ppomax.sharding import Trained, call, ranks


@torch.no_grad()
def rollout(
    policy: PreTrainedModel,
    reference: PreTrainedModel | Branch | None,
    critic: Critic | TrunkCritic | Trained[Any],
    prompts: Sequence[Sequence[int]],
    *,
    config: RolloutConfig,
    batch: BatchConfig,
    eos_ids: Sequence[int],
    uids: Sequence[int],
    seed: int,
    generator: torch.Generator | None = None,
    trunk_layers: int | None = None,
    announce: Callable[[RolloutPlan], None] | None = None,
    impl: str = "auto",
) -> Rollout:
    """One response to each prompt (token ids), scored. `generator` shuffles sequences into minibatches; `reference`
    and `trunk_layers` as in `score`; `announce` is told the plan of decoding, memory included, before it starts."""
    mine = ranks.part_of(len(prompts))
    own = decode(
        policy,
        [prompts[i] for i in mine],
        [uids[i] for i in mine],
        eos_ids=eos_ids,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=seed,
        slots=config.slots,
        cache_tokens=config.cache_tokens,
        trunk_layers=trunk_layers,
        cuda_graphs=config.cuda_graphs,
        announce=announce,
        impl=impl,
    )
    responses = joined(own, policy)
    lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses.tokens, strict=True)])
    plan = split_minibatches(lengths, batch.minibatch_size, batch.micro_tokens, generator, ranks.position())
    began = time.perf_counter()
    roll = score(
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
    scored = {"perf/scoring_tokens_per_second": float(lengths.sum()) / (time.perf_counter() - began)}
    return dataclasses.replace(roll, stats=own.stats.metrics() | scored)


@torch.no_grad()
def score(
    policy: PreTrainedModel,
    reference: PreTrainedModel | Branch | None,
    critic: Critic | TrunkCritic | Trained[Any],
    prompts: Sequence[Sequence[int]],
    responses: Responses,
    plan: MicroBatches,
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
    logprobs, entropy, ref_logprobs, values = fields = torch.zeros(4, count, device=device)

    def micros() -> Iterator[tuple[Tensor, float, tuple[Tensor, Tensor, Tensor, Trunk | None]]]:
        """Of each of this rank's micro-batches: slots in the (N,) fields, 0.0 for a stand-in, what a scorer takes."""
        for micro in (m for minibatch in plan for m in minibatch):
            which = with_stand_in(micro, cu).to(device)
            at, micro_cu = spans(cu, which)
            slots, micro_response_cu = spans(response_cu, which)
            counts = float(len(micro) > 0)
            packed = (tokens[at], micro_cu, _states(micro_cu, micro_response_cu), select_trunk(trunk, cu, which))
            yield slots, counts, packed

    # Each token is scored on one rank and is 0 on the others, so the sum over ranks is exact.
    for slots, counts, packed in micros():
        scored = call(policy, policy_logprobs, *packed, temperature=temperature, entropy=True, impl=impl)
        logprobs[slots], entropy[slots] = (counts * x for x in scored)
        values[slots] = counts * call(critic, state_values, *packed)
    with adapters_off(policy) if reference is None else nullcontext():
        for slots, counts, packed in micros():
            owner = policy if reference is None else reference
            scored = call(owner, policy_logprobs, *packed, temperature=temperature, impl=impl)
            ref_logprobs[slots] = counts * scored[0]
    logprobs, entropy, ref_logprobs, values = ranks.sum(fields)
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
        micro_batches=plan,
        trunk=trunk,
    )


def _trunk(
    policy: PreTrainedModel, responses: Responses, tokens: Tensor, cu: Tensor, plan: MicroBatches, layers: int
) -> Trunk:
    """What enters block `layers` at all tokens but each sequence's last: recorded while decoding, or computed here."""
    if responses.trunk is not None:
        return Trunk(layers, torch.cat(responses.trunk))
    ends = trunk_cu(cu)
    keep = torch.ones(len(tokens), dtype=torch.bool, device=cu.device).index_fill_(0, last_tokens(cu), False)
    states = torch.zeros(int(ends[-1]), embedding_weight(policy).shape[1], dtype=policy.dtype, device=cu.device)
    for micro in (m for minibatch in plan for m in minibatch if len(m)):
        at, micro_cu = spans(ends, micro.to(cu.device))
        states[at] = bottom_states(policy, tokens[keep][at], micro_cu, layers)
    return Trunk(layers, ranks.sum(states))


def joined(responses: Responses, policy: PreTrainedModel) -> Responses:
    """The responses of all ranks, in rank order, on every rank; their numbers travel as tensors. One process: the
    same."""
    if ranks.world_size() == 1:
        return responses
    device = policy.device
    lengths = ranks.gather(torch.tensor([len(r) for r in responses.tokens], dtype=torch.int64, device=device)).tolist()
    tokens = torch.tensor([t for r in responses.tokens for t in r], dtype=torch.int64, device=device)
    logprobs = torch.tensor([x for r in responses.logprobs for x in r], dtype=torch.float32, device=device)
    finished = torch.tensor(responses.finished, dtype=torch.uint8, device=device)
    return Responses(
        [part.tolist() for part in ranks.gather(tokens).split(lengths)],
        [part.tolist() for part in ranks.gather(logprobs).split(lengths)],
        [bool(x) for x in ranks.gather(finished).tolist()],
        None if responses.trunk is None else _joined_trunk(responses.trunk, policy),
    )


def _joined_trunk(trunk: list[Tensor], policy: PreTrainedModel) -> list[Tensor]:
    sizes = torch.tensor([len(x) for x in trunk], dtype=torch.int64, device=policy.device)
    none = torch.empty(0, embedding_weight(policy).shape[1], dtype=policy.dtype, device=policy.device)
    return list(ranks.gather(torch.cat([none, *trunk])).split(ranks.gather(sizes).tolist()))


def _states(cu: Tensor, response_cu: Tensor) -> Tensor:
    """(N,) index of the state before each response token, given that a response is the tail of its sequence."""
    lengths = response_cu.diff().long()
    first = last_tokens(cu) - lengths  # the token before the response's first
    shift = torch.repeat_interleave(first - response_cu[:-1].long(), lengths)
    return torch.arange(len(shift), device=cu.device) + shift
