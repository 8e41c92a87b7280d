"""A plain decode loop with transformers' KV cache: left-padded prompts, one step a token, finished rows dropped from
the batch once enough of them are done. Any HF causal LM; no per-family code. Slots, pages and graphs are left out on
purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ppomax_kernels as K
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ppomax.models import Head, base_of, head_of

MASK = (1 << 64) - 1
COMPACT_SHARE = 0.125
"""Share of finished rows at which the cache is cut down to the living ones: the cut copies the cache once, as each step
of a growing cache does anyway."""


@dataclass(frozen=True)
class Responses:
    """What was sampled, in the prompts' order, on the host."""

    tokens: list[list[int]]
    """Response ids, EOS included where it came."""
    logprobs: list[list[float]]
    """Of each token under the distribution sampled from."""
    finished: list[bool]
    """Ended by EOS."""


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uids: Sequence[int],
    *,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
    impl: str = "auto",
) -> Responses:
    """Sample one response to each prompt (token ids, none empty). temperature 0 is greedy.

    uids: one number a sequence, which with `seed` names its random stream: the draws depend on (seed, uid, position)
    alone, so neither on batch, slot or rank, and no generator has a state to save. Prompts of like lengths share a
    batch; the results do not depend on that beyond the rounding of the model's forward."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = Responses([[] for _ in prompts], [[] for _ in prompts], [False for _ in prompts])
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        tokens, logprobs, lengths, finished = _decode_batch(
            model,
            [prompts[i] for i in part],
            stream_seeds(seed, [uids[i] for i in part]),
            eos_ids,
            max_new_tokens,
            min_new_tokens,
            temperature,
            top_k,
            top_p,
            impl,
        )
        for row, i in enumerate(part):
            n = int(lengths[row])
            out.tokens[i], out.logprobs[i] = tokens[row, :n].tolist(), logprobs[row, :n].tolist()
            out.finished[i] = bool(finished[row])
    return out


def _decode_batch(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    seeds: Tensor,
    eos_ids: Sequence[int],
    limit: int,
    least: int,
    temperature: float,
    top_k: int,
    top_p: float,
    impl: str,
) -> tuple[Tensor, ...]:
    device, count = model.device, len(prompts)
    eos = torch.tensor(list(eos_ids), device=device)
    ids, mask = _left_pad(prompts, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, head, base = DynamicCache(config=model.config), head_of(model), base_of(model)
    tokens = torch.zeros(count, limit, dtype=torch.int64, device=device)
    logprobs = torch.zeros(count, limit, device=device)
    lengths = torch.full((count,), limit, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    rows, alive = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    seeds = seeds.to(device)
    for t in range(limit):
        hidden = base(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = _without_eos(head, hidden, eos if t < least else eos[:0])
        token, logprob, _, _ = K.sample(
            logits, seeds[rows], torch.full_like(rows, t), temperature=temperature, top_k=top_k, top_p=top_p, impl=impl
        )
        tokens[rows[alive], t], logprobs[rows[alive], t] = token[alive], logprob[alive]
        ended = alive & torch.isin(token, eos)
        finished[rows[ended]], lengths[rows[ended]] = True, t + 1
        alive = alive & ~ended
        left = int(alive.sum())
        if not left or t + 1 == limit:
            break
        ids, mask, positions = token[:, None], torch.nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        if len(rows) - left >= max(1, COMPACT_SHARE * len(rows)):
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            ids, mask, positions, rows, alive = ids[keep], mask[keep], positions[keep], rows[keep], alive[keep]
    return tokens.cpu(), logprobs.cpu(), lengths.cpu(), finished.cpu()


def stream_seeds(seed: int, uids: Sequence[int]) -> Tensor:
    """(B,) int64 keys of the sequences' random streams: SplitMix64 of (seed, uid), so that near uids share nothing."""
    return torch.tensor([_signed(_mix(_mix(seed) ^ _mix(uid * 2 + 1))) for uid in uids], dtype=torch.int64)


def _mix(x: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014) on 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _without_eos(head: Head, hidden: Tensor, eos: Tensor) -> Tensor:
    logits = head.logits(hidden)
    return logits.index_fill(1, eos, -torch.inf) if len(eos) else logits


def _left_pad(prompts: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T). The fill is id 0 and never attended to, so no pad token is needed."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)
