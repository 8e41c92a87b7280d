"""The three shapes that a sequence takes on its way: Rollout -> Experience -> Minibatch.

Sequences travel packed: one row of tokens and `cu_seqlens` (int32, S+1), no padding, so no slot exists that could hold
a NaN or be counted by mistake. P counts all tokens (prompt + response), N response tokens, S sequences. The response
token y_t at tokens[i] is produced by the state at i-1: `states[n] = i-1` is where its logprob and V(s_t) are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppomax.config import BatchConfig
from ppomax.models.transfers import sent
from ppomax.recipe.moments import RunningMoments
from ppomax.recipe.units import Units
from ppomax.sharding import ranks

MicroBatches = list[list[Tensor]]
"""Minibatches of micro-batches of sequence indices (int64). Under several ranks, this rank's part: an empty micro-batch
stands where others have one more, so that all make the same number of forwards."""


@dataclass(frozen=True)
class Trunk:
    """What a frozen trunk made of packed sequences, so that nobody runs it a second time (see branch.py)."""

    layers: int
    """Blocks in the trunk; `states` is what enters the next one."""
    states: Tensor
    """(P-S, D) in the model's dtype: all positions but each sequence's last token, which produces nothing. Of a rollout
    on several ranks only those of the sequences that this rank trains on, and of the shortest, which stands in."""
    starts: Tensor | None = None
    """(S,) int64 on the host, where each sequence's states begin; -1: they are with another rank. None: all are here,
    in order."""
    owners: list[int] | None = None
    """Which rank trains on each sequence, in every pass."""


@dataclass(frozen=True)
class Rollout:
    """Prompts with sampled responses, scored by policy, reference and critic."""

    tokens: Tensor
    """(P,) int64, prompt then response of each sequence."""
    cu_seqlens: Tensor
    """(S+1,) int32, where each sequence starts in `tokens`."""
    response_cu: Tensor
    """(S+1,) int32, where each response starts in the (N,) fields."""
    states: Tensor
    """(N,) int64, index into `tokens` of the state that produced each response token."""
    finished: Tensor
    """(S,) bool, the response ended by EOS; False: it was cut at the length limit."""
    sampler_logprobs: Tensor
    """(N,) float32, under the distribution sampled from."""
    logprobs: Tensor
    """(N,) float32, of the policy, in the packing and dtype of the training forward."""
    entropy: Tensor
    """(N,) float32, of the policy at each state, nats."""
    ref_logprobs: Tensor
    """(N,) float32, of the reference."""
    values: Tensor
    """(N,) float32, V(s_t) of the critic."""
    micro_batches: MicroBatches
    """Which sequences were scored together; the first epoch trains on the same ones."""
    last_values: Tensor | None = None
    """(S,) float32, V after each response's last token, for `advantage.bootstrap_truncated`."""
    kl: Tensor | None = None
    """(N,) float32, KL of policy to reference over the whole vocabulary at each state, nats, for `kl.estimator:
    vocabulary`."""
    untempered: tuple[Tensor, Tensor] | None = None
    """(N,) float32 each, logprobs and ref_logprobs at temperature 1, where the sampling temperature is another."""
    kept: Tensor | None = None
    """(N, W), what each response token was drawn from (rollout/kept.py), where sampling was cut: logprobs, entropy and
    ref_logprobs are then over these tokens. None: over the whole vocabulary."""
    trunk: Trunk | None = None
    """Of the policy, where its lower blocks are frozen (`model.train: hydra`); else None."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """What the data says of each prompt besides, by name: a list of S each, for reward functions."""
    stats: dict[str, float] = field(default_factory=dict)
    """What making it cost, by metric name: tokens a second by phase, slot occupancy, cache use."""

    @cached_property
    def on_host(self) -> tuple[Tensor, Tensor]:
        """cu_seqlens and response_cu on the host, so that cutting micro-batches waits for the device once."""
        return self.cu_seqlens.cpu(), self.response_cu.cpu()

    @property
    def labels(self) -> Tensor:
        """(N,) int64, the response tokens."""
        return self.tokens[self.states + 1]

    @property
    def lengths(self) -> Tensor:
        """(S,) int64, response lengths, EOS included."""
        return self.response_cu.diff().long()

    def another_pass(self, batch: BatchConfig, generator: torch.Generator | None, *, padded: bool) -> MicroBatches:
        """This rank's micro-batches of a pass after the first, shuffled. Sequences whose trunk states lie with a rank
        stay there."""
        owners = None if self.trunk is None else self.trunk.owners
        lengths, (size, budget) = self.on_host[0].diff(), (batch.minibatch_size, batch.micro_tokens)
        return split_minibatches(lengths, size, budget, generator, ranks.position(), padded=padded, owners=owners)

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) token ids of each sequence, on the host."""
        tokens, ends, lengths = self.tokens.tolist(), self.cu_seqlens.tolist(), self.lengths.tolist()
        cut = [end - n for end, n in zip(ends[1:], lengths, strict=True)]
        return [(tokens[a:b], tokens[b:c]) for a, b, c in zip(ends[:-1], cut, ends[1:], strict=True)]


@dataclass(frozen=True)
class Experience:
    """A rollout with what PPO learns from."""

    rollout: Rollout
    scores: Tensor
    """(S,) float32, raw reward."""
    shaped_scores: Tensor
    """(S,) float32, after standardising, clipping and the missing-EOS penalty."""
    rewards: Tensor
    """(N,) float32, per token: -kl_coef * KL, plus the shaped score at each last token, or where it is earned."""
    advantages: Tensor
    """(N,) float32, the actor's."""
    returns: Tensor
    """(N,) float32, the critic's targets."""
    kl_coef: float
    """Coefficient that `rewards` was made with."""
    moments: RunningMoments
    """Of all scores up to and with these."""
    units: Units
    """Of values, advantages and returns: those of the shaped scores."""
    score_parts: dict[str, Tensor] = field(default_factory=dict)
    """(S,) raw scores of each source, by name, where several are added."""


@dataclass(frozen=True)
class Minibatch:
    """Some sequences of an experience, packed anew: what one forward and backward sees."""

    tokens: Tensor
    cu_seqlens: Tensor
    """On the host, so that a forward need not ask the device for lengths; all others on the device."""
    states: Tensor
    labels: Tensor
    sampler_logprobs: Tensor
    old_logprobs: Tensor
    entropy: Tensor
    """As the buffer was scored."""
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    kept: Tensor | None = None
    trunk: Trunk | None = None
    weight: float = 1.0
    """What its losses are multiplied by: 0 for a stand-in, which keeps ranks in step."""
    ent_coef: float | None = None
    """In place of `loss.ent_coef`, where an entropy target gives its sign."""


def pack(sequences: Iterable[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token lists -> tokens (P,) int64, cu_seqlens (S+1,) int32."""
    rows = [torch.as_tensor(s, dtype=torch.int64) for s in sequences]
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
    return torch.cat(rows).to(device), cumulative(lengths).to(device)


def cumulative(lengths: Tensor) -> Tensor:
    """(S,) lengths -> (S+1,) int32 starts, `cat([0, cumsum])`."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def spans(cu: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of all elements of the packed sequences `which`, in that order, and their own cu: `cat([arange(cu[i],
    cu[i+1])])`."""
    starts, lengths = cu[:-1].long()[which], cu.diff().long()[which]
    new_cu = cumulative(lengths)
    shift = (starts - new_cu[:-1].long()).repeat_interleave(lengths)
    return torch.arange(len(shift), device=cu.device) + shift, new_cu


def per_token(values: Tensor, cu: Tensor) -> Tensor:
    """(S,) -> (N,): each sequence's value at each of its tokens."""
    return torch.repeat_interleave(values, cu.diff().long())


def last_tokens(cu: Tensor) -> Tensor:
    """(S,) int64, index of each sequence's last element."""
    return cu[1:].long() - 1


def select(rollout: Rollout, which: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences `which` packed anew: their tokens, cu_seqlens (on the host), states (into those tokens), and their
    slots in the (N,) fields."""
    which, device = which.cpu(), rollout.tokens.device
    old_cu, old_response_cu = rollout.on_host
    at, cu = spans(old_cu, which)
    slots, response_cu = spans(old_response_cu, which)
    moved = sent(per_token(cu[:-1].long() - old_cu[:-1].long()[which], response_cu), device)
    at, slots = sent(at, device), sent(slots, device)
    return rollout.tokens[at], cu, rollout.states[slots] + moved, slots


def trunk_cu(cu: Tensor) -> Tensor:
    """(S+1,) int32 starts of sequences without their last tokens: `cu - arange(S+1)`."""
    return cu - torch.arange(len(cu), dtype=cu.dtype, device=cu.device)


def select_trunk(trunk: Trunk | None, cu: Tensor, which: Tensor) -> Trunk | None:
    """The trunk states of the sequences `which`, in that order; `cu` is that of the whole sequences, on the host."""
    if trunk is None:
        return None
    whole, which = trunk_cu(cu), which.cpu()
    at, new_cu = spans(whole, which)
    if trunk.starts is not None:
        starts = trunk.starts[which]
        if bool((starts < 0).any()):
            raise ValueError("select_trunk: the trunk states of a sequence are with another rank, which trains on it")
        at = at + per_token(starts - whole[:-1].long()[which], new_cu)
    return Trunk(trunk.layers, trunk.states[sent(at, trunk.states.device)])


def with_stand_in(which: Tensor, cu: Tensor) -> Tensor:
    """`which`; of an empty micro-batch, the shortest sequence: a cheap forward that keeps ranks in step."""
    return which if len(which) else cu.diff().argmin().view(1).to(which.device)


def minibatch(experience: Experience, which: Tensor) -> Minibatch:
    """The sequences `which` of `experience`, packed for one forward; a stand-in if there are none."""
    roll = experience.rollout
    weight, which = float(len(which) > 0), with_stand_in(which, roll.on_host[0])
    tokens, cu, states, slots = select(roll, which)
    return Minibatch(
        tokens=tokens,
        cu_seqlens=cu,
        states=states,
        labels=tokens[states + 1],
        sampler_logprobs=roll.sampler_logprobs[slots],
        old_logprobs=roll.logprobs[slots],
        entropy=roll.entropy[slots],
        ref_logprobs=roll.ref_logprobs[slots],
        old_values=roll.values[slots],
        advantages=experience.advantages[slots],
        returns=experience.returns[slots],
        kept=None if roll.kept is None else roll.kept[slots],
        trunk=select_trunk(roll.trunk, roll.on_host[0], which),
        weight=weight,
    )


def split_minibatches(
    lengths: Tensor,
    minibatch_size: int,
    micro_tokens: int,
    generator: torch.Generator | None,
    position: tuple[int, int] = (0, 1),
    *,
    padded: bool = False,
    owners: Sequence[int] | None = None,
) -> MicroBatches:
    """Cut sequences into minibatches of `minibatch_size`, each into micro-batches of at most `micro_tokens` tokens:
    those that a forward computes, so rows times the longest where it is `padded`.

    lengths: (S,) whole lengths, of all ranks. Every sequence is in exactly one micro-batch; the last minibatch may be
    smaller. A sequence longer than the budget gets a micro-batch of its own. `generator` shuffles; None keeps the
    order. Inside a minibatch sequences go by length, so that a micro-batch holds like lengths and wastes little where
    the forward has to pad. `position`: this rank's number and how many there are. Which sequences share a minibatch
    does not depend on it; inside one they are dealt out so that ranks get like numbers of tokens, or to their `owners`.
    """
    host = lengths.tolist()
    order = torch.randperm(len(host), generator=generator).tolist() if generator else list(range(len(host)))
    rank, count = position
    minibatches: MicroBatches = []
    for start in range(0, len(order), minibatch_size):
        part = order[start : start + minibatch_size]
        to = ranks.deal([host[i] for i in part], count) if owners is None else [owners[i] for i in part]
        hands = [[i for i, owner in zip(part, to, strict=True) if owner == r] for r in range(count)]
        packed = [_pack_micro(hand, host, micro_tokens, padded) for hand in hands]
        mine = packed[rank] + [[]] * (max(map(len, packed)) - len(packed[rank]))
        minibatches.append([torch.tensor(m, dtype=torch.int64) for m in mine])
    return minibatches


def _pack_micro(which: list[int], lengths: list[int], micro_tokens: int, padded: bool) -> list[list[int]]:
    micros: list[list[int]] = []
    used = 0
    for i in sorted(which, key=lengths.__getitem__):  # so the one that joins is the longest
        used = (len(micros[-1]) + 1) * lengths[i] if padded and micros else used + lengths[i]
        if not micros or used > micro_tokens:
            micros.append([])
            used = lengths[i]
        micros[-1].append(i)
    return micros
