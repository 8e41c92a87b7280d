"""Generate, pack, score: policy, reference and critic each see the finished sequences once, in the micro-batches that
training will use. Under several ranks each generates and scores its share, and all end up with the whole rollout, so
that what follows (moments, whitening, plans) is that of one process. What models share (a frozen trunk, or all weights
but the adapters) is neither held nor run twice."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.config import BatchConfig
from ppomax.models import any_pads, embedding_weight
from ppomax.models.adapter_critic import AnyCritic
from ppomax.models.adapters import adapters_off
from ppomax.models.branch import Branch, bottom_states
from ppomax.models.fused_trunk import fused_trunk
from ppomax.models.transfers import sent
from ppomax.recipe.batch import (
    MicroBatches,
    Rollout,
    Trunk,
    cumulative,
    last_tokens,
    pack,
    per_token,
    select_trunk,
    spans,
    split_minibatches,
    trunk_cu,
    with_stand_in,
)
from ppomax.recipe.scoring import Against, lm_head_of, score_states, state_values
from ppomax.rollout import Responses, RolloutSizes, Sampling, decode
from ppomax.rollout.joined import joined
from ppomax.rollout.sizes import RolloutError
from ppomax.sharding import Trained, call, ranks

FAR = 1.0
"""Mean distance of a sampler's logprobs from the policy's, in nats, that no rounding and no cut sampling makes."""


class Scorers(NamedTuple):
    """The models that a rollout is scored by, the first of which also samples where nothing is drawn yet."""

    policy: PreTrainedModel
    reference: PreTrainedModel | Branch | None
    """None: the policy with its adapters off."""
    critic: AnyCritic | Trained[Any]
    trunk_layers: int | None = None
    """b: of the policy all but the blocks from b on is frozen, and no scorer runs the blocks below."""
    drawn: Responses | None = None
    """This rank's responses, by another sampler. None: our decoder draws them."""
    fetch: Callable[[], None] | None = None
    """Called when all are drawn: reference and critic are needed from then on."""


@torch.no_grad()
def rollout(
    models: Scorers,
    prompts: Sequence[Sequence[int]],
    uids: Sequence[int],
    sampling: Sampling,
    batch: BatchConfig,
    *,
    eos_ids: Sequence[int],
    generator: torch.Generator | None = None,
    announce: Callable[[RolloutSizes], None] | None = None,
    last_values: bool = False,
    whole_kl: bool = False,
) -> Rollout:
    """One response to each prompt (token ids), scored. `generator` shuffles sequences into minibatches; `announce` is
    told the sizes of decoding, memory included, before it starts. last_values, whole_kl: see `score`."""
    mine = ranks.part_of(len(prompts))
    own = models.drawn
    if own is None:
        given = (models.policy, [prompts[i] for i in mine], [uids[i] for i in mine], sampling)
        own = decode(*given, eos_ids=eos_ids, trunk_layers=models.trunk_layers, announce=announce)
    responses = joined(own, models.policy)
    lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses.tokens, strict=True)])
    size, budget = batch.minibatch_size, batch.micro_tokens
    padded = any_pads(models.policy, models.reference, models.critic)
    micro_batches = split_minibatches(lengths, size, budget, generator, ranks.position(), padded=padded)
    began = time.perf_counter()
    if models.fetch is not None:
        models.fetch()
    how: dict[str, Any] = {"temperature": sampling.temperature, "impl": sampling.impl}
    how |= {"last_values": last_values, "whole_kl": whole_kl}
    roll = score(models, prompts, responses, micro_batches, **how)
    if models.drawn is not None:
        _check_sampler(roll)
    scored = {"perf/scoring_tokens_per_second": float(lengths.sum()) / (time.perf_counter() - began)}
    return dataclasses.replace(roll, stats=own.stats.metrics() | scored)


def _check_sampler(roll: Rollout) -> None:
    """RolloutError if the sampler drew from something else than the policy, as from weights of another time."""
    gap = float((roll.logprobs - roll.sampler_logprobs).abs().mean())
    if not gap <= FAR:
        raise RolloutError(
            f"rollout: the sampler's logprobs are {gap:.2f} nats from the policy's in the mean, so it does not draw "
            "from this policy; look at how it takes the weights, or set rollout.sampler: builtin"
        )


@torch.no_grad()
def score(
    models: Scorers,
    prompts: Sequence[Sequence[int]],
    responses: Responses,
    micro_batches: MicroBatches,
    *,
    temperature: float = 1.0,
    impl: str = "auto",
    last_values: bool = False,
    whole_kl: bool = False,
) -> Rollout:
    """Pack prompts with responses (from any sampler) and score them micro-batch by micro-batch. last_values: the critic
    is read after each response's last token, too; not a TrunkCritic, which has no state there. whole_kl: KL over all
    tokens at each state (`Rollout.kl`), for which the policy's (N, D) states are held until the reference has run.

    What enters the lowest trained block is taken from the responses, or computed once if the sampler did not record
    it; logprobs and entropies too, where it gave what scoring would: then the policy is not run."""
    device = models.policy.device
    tokens, host_cu = pack([list(p) + list(r) for p, r in zip(prompts, responses.tokens, strict=True)])
    host_response_cu = cumulative(torch.tensor([len(r) for r in responses.tokens]))
    tokens, cu, response_cu = tokens.to(device), host_cu.to(device), host_response_cu.to(device)
    sampled = torch.tensor([x for row in responses.logprobs for x in row], dtype=torch.float32, device=device)
    kept = None if responses.kept is None else torch.cat(responses.kept)
    trunk: Trunk | None = None

    def micros() -> Iterator[_Micro]:
        """Packed when its turn comes, so that no two are held at once."""
        return (_micro(m, tokens, host_cu, host_response_cu, trunk, kept) for each in micro_batches for m in each)

    with fused_trunk(models.policy, models.reference, models.critic, impl=impl):
        if models.trunk_layers is not None:
            trunk = _trunk(models.policy, responses, tokens, host_cu, micro_batches, models.trunk_layers)
        how: dict[str, Any] = {"temperature": temperature, "impl": impl, "whole_kl": whole_kl}
        fields = _fields(models, micros, len(sampled), run_policy=responses.scored is None or whole_kl, **how)
        last = ranks.sum(_last_values(models, micros, len(host_cu) - 1)) if last_values else None
    logprobs, entropy, ref_logprobs, values, kl, *untempered = ranks.sum(fields)
    if responses.scored is not None:
        logprobs, entropy, *untempered[: temperature != 1.0] = torch.cat(responses.scored).T.contiguous().to(device)
    return Rollout(
        tokens=tokens,
        cu_seqlens=cu,
        response_cu=response_cu,
        states=_states(host_cu, host_response_cu).to(device),
        finished=torch.tensor(responses.finished, device=device),
        sampler_logprobs=sampled,
        logprobs=logprobs,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        values=values,
        micro_batches=micro_batches,
        last_values=last,
        kl=kl if whole_kl else None,
        untempered=(untempered[0], untempered[1]) if temperature != 1.0 else None,
        kept=kept,
        trunk=trunk,
    )


class _Micro(NamedTuple):
    """One micro-batch of a scoring."""

    which: Tensor
    """Its sequences."""
    slots: Tensor
    """Where its response tokens stand in the (N,) fields."""
    weight: float
    """0 for a stand-in."""
    packed: tuple[Tensor, Tensor, Tensor, Trunk | None]
    """What a scorer takes: tokens, cu_seqlens, states, trunk."""
    kept: Tensor | None
    """What its response tokens were drawn from, where sampling was cut."""


def _micro(
    which: Tensor, tokens: Tensor, cu: Tensor, response_cu: Tensor, trunk: Trunk | None, kept: Tensor | None
) -> _Micro:
    """cu and response_cu on the host, where the cutting is done."""
    weight, which, device = float(len(which) > 0), with_stand_in(which, cu), tokens.device
    at, micro_cu = spans(cu, which)
    slots, micro_response_cu = spans(response_cu, which)
    states = sent(_states(micro_cu, micro_response_cu), device)
    packed = (tokens[sent(at, device)], micro_cu, states, select_trunk(trunk, cu, which))
    slots = sent(slots, device)
    return _Micro(sent(which, device), slots, weight, packed, None if kept is None else kept[slots])


def _fields(
    models: Scorers,
    micros: Callable[[], Iterator[_Micro]],
    count: int,
    *,
    temperature: float,
    impl: str,
    whole_kl: bool,
    run_policy: bool,
) -> Tensor:
    """(7, N) logprobs, entropy, ref_logprobs, values, KL over all tokens (0 unless `whole_kl`), and logprobs and
    ref_logprobs at temperature 1 (0 where it is 1). Each token is scored on one rank and is 0 on the others, so the sum
    over ranks is exact; a stand-in adds 0 to what its sequence may have here already."""
    policy = models.policy
    owner = policy if models.reference is None else models.reference
    fields = torch.zeros(7, count, device=policy.device)
    logprobs, entropy, ref_logprobs, values, kl, untempered, ref_untempered = fields
    how: dict[str, Any] = {"temperature": temperature, "impl": impl}
    hidden: list[Tensor] = []
    for micro in micros():
        if run_policy:
            own = score_states(policy, *micro.packed, entropy=True, kept=micro.kept, **how)
            _put_tokens(micro, ((logprobs, own.logprobs), (entropy, own.entropy), (untempered, own.untempered)))
            if whole_kl:
                hidden.append(own.hidden)
        _put_tokens(micro, [(values, call(models.critic, state_values, *micro.packed))])
    with adapters_off(policy) if models.reference is None else nullcontext():
        for i, micro in enumerate(micros()):
            against = Against(hidden[i], lm_head_of(policy)) if whole_kl else None
            ref = call(owner, score_states, *micro.packed, kept=micro.kept, against=against, **how)
            _put_tokens(micro, ((ref_logprobs, ref.logprobs), (ref_untempered, ref.untempered), (kl, ref.kl)))
    return fields


def _put_tokens(micro: _Micro, found: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Add what was found of a micro-batch's response tokens to the (N,) fields; None: it was not asked for."""
    for field, x in found:
        if x is not None:
            field[micro.slots] += micro.weight * x


def _last_values(models: Scorers, micros: Callable[[], Iterator[_Micro]], count: int) -> Tensor:
    """(S,) values after the last tokens, of this rank's sequences; 0 of the others."""
    values = torch.zeros(count, device=models.policy.device)
    for micro in micros():
        tokens, cu, _, _ = micro.packed
        ends = sent(last_tokens(cu), tokens.device)
        values[micro.which] += micro.weight * call(models.critic, state_values, tokens, cu, ends)
    return values


def _trunk(
    policy: PreTrainedModel, responses: Responses, tokens: Tensor, cu: Tensor, micro_batches: MicroBatches, layers: int
) -> Trunk:
    """What enters block `layers` at all tokens but each sequence's last, of the sequences that this rank trains on:
    recorded while decoding, where each was sampled, or computed here."""
    count, device, ends = len(cu) - 1, tokens.device, trunk_cu(cu)
    own = torch.cat([m for micros in micro_batches for m in micros] or [torch.zeros(0, dtype=torch.int64)])
    owners = torch.zeros(count, device=device)
    owners[sent(own, device)] = float(ranks.rank())
    stand_in = with_stand_in(own[:0], cu)
    held = torch.cat([own, stand_in]).unique()
    sizes = ends.diff().long()
    starts = torch.full((count,), -1, dtype=torch.int64)
    starts[held] = cumulative(sizes[held])[:-1].long()
    width, dtype = embedding_weight(policy).shape[1], policy.dtype
    states = torch.zeros(int(sizes[held].sum()), width, dtype=dtype, device=device)
    trunk = Trunk(layers, states, starts, [int(x) for x in ranks.sum(owners).tolist()])
    if responses.trunk is None:
        keep = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, last_tokens(cu), False)
        kept = tokens[keep.nonzero()[:, 0].to(device)]
        each = [m for micros in micro_batches for m in micros if len(m)]
        for micro in each if int(stand_in) in own else [*each, stand_in]:
            at, micro_cu = spans(ends, micro)
            _put(trunk, micro, sizes, bottom_states(policy, kept[sent(at, device)], micro_cu, layers))
        return trunk
    parts = [torch.tensor(ranks.part_of(count, r), dtype=torch.int64) for r in range(ranks.world_size())]
    sampled = torch.cat([states[:0], *responses.trunk])
    for part, block in zip(parts, ranks.in_turn(sampled, [int(sizes[p].sum()) for p in parts]), strict=True):
        mine = part[torch.isin(part, held)]
        at, _ = spans(cumulative(sizes[part]), torch.searchsorted(part, mine))
        _put(trunk, mine, sizes, block[sent(at, device)])
    return trunk


def _put(trunk: Trunk, which: Tensor, sizes: Tensor, states: Tensor) -> None:
    """Store the states of the sequences `which`, one after the other."""
    assert trunk.starts is not None
    own = cumulative(sizes[which])
    at = per_token(trunk.starts[which] - own[:-1].long(), own) + torch.arange(int(own[-1]))
    trunk.states[sent(at, trunk.states.device)] = states


def _states(cu: Tensor, response_cu: Tensor) -> Tensor:
    """(N,) index of the state before each response token, given that a response is the tail of its sequence."""
    lengths = response_cu.diff().long()
    first = last_tokens(cu) - lengths  # the token before the response's first
    shift = torch.repeat_interleave(first - response_cu[:-1].long(), lengths)
    return torch.arange(len(shift), device=cu.device) + shift
