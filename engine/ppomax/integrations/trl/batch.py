"""A batch of TRL's, without its padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppomax.recipe.batch import cumulative, pack, spans


class Batch(NamedTuple):
    """Prompts with responses, packed, and what PPO learns from at their N slots: one for each response token; and one
    more, for the state after the last, of those sequences that are shorter than a given width."""

    tokens: Tensor
    """(P,) int64."""
    cu_seqlens: Tensor
    """(S+1,) int32, in `tokens`."""
    slot_cu: Tensor
    """(S+1,) int32, in what follows, of shape (N,)."""
    states: Tensor
    """Where a slot's state stands in `tokens`."""
    labels: Tensor
    """The token that followed; 0 where none did."""
    sampled: Tensor
    """bool: one did, and it is learnt from."""
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def last_sampled(self) -> Tensor:
        """(S,) slot of each sequence's last token that is learnt from; its last slot where there is none."""
        place = torch.arange(len(self.states), device=self.states.device) * self.sampled
        owner = torch.repeat_interleave(torch.arange(len(self.slot_cu) - 1, device=place.device), self.slot_cu.diff())
        last = torch.full((len(self.slot_cu) - 1,), -1, device=place.device)
        last = last.scatter_reduce(0, owner[self.sampled], place[self.sampled], "amax")
        return torch.where(last < 0, self.slot_cu[1:].long() - 1, last)

    def rows(self, which: Tensor) -> Batch:
        """Some of its sequences."""
        at, cu = spans(self.cu_seqlens, which)
        slots, slot_cu = spans(self.slot_cu, which)
        moved = (cu[:-1] - self.cu_seqlens[:-1][which]).long().repeat_interleave(slot_cu.diff().long())
        fields = (x[slots] for x in self[5:])
        return Batch(self.tokens[at], cu, slot_cu, self.states[slots] + moved, self.labels[slots], *fields)


def laid_out(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: Any, width: int = 0
) -> Batch:
    """Tokens, slots and labels; the rest is 0 yet. width: sequences with fewer response tokens get one slot more."""
    tokens, cu = pack([[*p, *r] for p, r in zip(prompts, responses, strict=True)], device)
    lengths = torch.tensor([len(r) for r in responses], device=device)
    slot_cu = cumulative(lengths + (lengths < width)).to(device)
    counts = slot_cu.diff().long()
    first = (cu[1:].long() - lengths - 1).repeat_interleave(counts)
    place = torch.arange(int(slot_cu[-1]), device=device) - slot_cu[:-1].long().repeat_interleave(counts)
    states, sampled = first + place, place < lengths.repeat_interleave(counts)
    labels = torch.where(sampled, tokens[(states + 1).clamp(max=len(tokens) - 1)], 0)
    nothing = torch.zeros(len(states), device=device)
    return Batch(tokens, cu, slot_cu, states, labels, sampled, *[nothing] * 5)


def plain(model: Any) -> Any:
    """Out of a PeftModel, whose adapters stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def whitened(x: Tensor, mask: Tensor, keep_mean: bool = False) -> Tensor:
    """To variance 1 (and mean 0) over the masked ones, by the unbiased variance."""
    kept = x[mask]
    white = (x - kept.mean()) * torch.rsqrt(kept.var() + 1e-8)
    return white + kept.mean() if keep_mean else white
