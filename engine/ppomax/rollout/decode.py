"""Continuous batching over the KV arena: every forward takes one token of each living sequence and the prompts that
start, as one packed row; what ends gives its slot to the next.

    admit -> forward (last tokens | new prompts) -> head -> one fused sampler -> ids to the host, once -> release

Nothing is padded, so the work of a step is its tokens. A sequence's draws come from a random stream of its own, so its
tokens do not depend on slots, order or neighbours (beyond the rounding of GEMMs of another height). Any HF causal LM
whose attention goes through transformers' interface; no per-family code. Steps without prompts may be replayed from
CUDA graphs (graphs.py), which round the rows up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ppomax_kernels as K
import torch
from ppomax_kernels.packed_linear import packed_linear
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.models import base_of, blocks_of, embedding_weight, head_of
from ppomax.rollout import slots as slotting
from ppomax.rollout.arena import Arena, Step
from ppomax.rollout.attention import Attention, arena_attention
from ppomax.rollout.graphs import DecodeGraphs, capture_for
from ppomax.rollout.packed_weights import packed_linears
from ppomax.rollout.recorder import Recorder
from ppomax.rollout.sizes import RolloutError, RolloutPlan, plan_rollout
from ppomax.rollout.slots import Admission, Prompt, Slots
from ppomax.rollout.text import TextStream

MASK = (1 << 64) - 1


@dataclass
class RolloutStats:
    """What a rollout cost. Seconds of a forward that carries both prompts and next tokens are split by tokens."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    occupied: int = 0
    """Living sequences, summed over steps."""
    slots: int = 0
    pages: int = 0
    most_pages: int = 0
    planned_bytes: int = 0

    def metrics(self) -> dict[str, float]:
        """Rates and shares, by the names that the engine logs."""
        out = {
            "rollout/prefill_tokens": float(self.prefill_tokens),
            "rollout/slot_occupancy": self.occupied / max(1, self.steps * self.slots),
            "rollout/cache_use": self.most_pages / max(1, self.pages),
            "rollout/planned_mib": self.planned_bytes / 2**20,
        }
        if self.prefill_seconds:
            out["perf/prefill_tokens_per_second"] = self.prefill_tokens / self.prefill_seconds
        if self.decode_seconds:
            out["perf/decode_tokens_per_second"] = self.decode_tokens / self.decode_seconds
        return out


@dataclass(frozen=True)
class Responses:
    """What was sampled, in the prompts' order, on the host."""

    tokens: list[list[int]]
    """Response ids, EOS included where it came; one that met a stop string ends with the token that completed it."""
    logprobs: list[list[float]]
    """Of each token under the distribution sampled from."""
    finished: list[bool]
    """Ended by EOS or a stop string, not by the length limit."""
    trunk: list[Tensor] | None = None
    """For `trunk_layers=b`: what enters block b at each token but the last, (len(prompt) + len(response) - 1, D)."""
    stats: RolloutStats = field(default_factory=RolloutStats)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn and when a response ends."""

    eos: frozenset[int]
    limit: int
    least: int
    temperature: float
    top_k: int
    top_p: float
    stops: Sequence[str]
    impl: str


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
    slots: int = 128,
    cache_tokens: int | None = None,
    stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    trunk_layers: int | None = None,
    cuda_graphs: bool = False,
    announce: Callable[[RolloutPlan], None] | None = None,
    on_token: Callable[[int, int, bool], None] | None = None,
    impl: str = "auto",
) -> Responses:
    """Sample one response to each prompt (token ids, none empty). temperature 0 is greedy. Equal prompts are prefilled
    once, however many responses they get.

    uids: one number a sequence, which with `seed` names its random stream: the draws depend on (seed, uid, position)
    alone, so neither on batch, slot or rank, and no generator has a state to save. eos_ids: tokens that end a response;
    none: only `stop` and the limit do. stop: strings that end it, found in its text by `tokenizer`.
    slots: sequences decoded at once. cache_tokens: most tokens that the KV arena holds; None: what the slots need.
    cuda_graphs: replay steps without prompts, with their rows rounded up; the model must be on a CUDA device.
    announce: told the plan, memory included, before anything is allocated. on_token(i, token, last): told each token
    of sequence i as it comes. Raises RolloutError for prompts, ends or sizes that cannot be served."""
    sampling = Sampling(
        frozenset(eos_ids), max_new_tokens, min_new_tokens, float(temperature), top_k, top_p, tuple(stop), impl
    )
    _check(model, prompts, uids, sampling, slots, tokenizer, trunk_layers)
    capture = capture_for(model.device) if cuda_graphs else None
    if not prompts:
        return Responses([], [], [], None if trunk_layers is None else [])
    distinct, recorded = slotting.grouped(prompts), trunk_layers is not None
    plan = plan_rollout(
        model, distinct, max_new_tokens, slots,
        cache_tokens=cache_tokens, trunk=recorded, graphs=cuda_graphs, impl=impl,
    )  # fmt: skip
    if announce is not None:
        announce(plan)
    arena = Arena(model.config, plan.pages, model.dtype, model.device, plan.page, scratch=cuda_graphs)
    with arena_attention(model, arena, plan.attention) as attention, packed_linears(model, plan.attention) as panels:
        loop = _Loop(model, attention, Slots(distinct, plan.slots, max_new_tokens, arena), sampling, len(prompts))
        loop.seeds = stream_seeds(seed, uids).to(model.device)
        loop.on_token, loop.panels = on_token, panels
        if stop:
            loop.texts = [TextStream(tokenizer) for _ in prompts]  # type: ignore[arg-type]
        if trunk_layers is not None:
            loop.recorder = Recorder(model, trunk_layers, plan.slots, max_new_tokens, len(prompts))
        if capture is not None:
            tables = loop.slots.tables
            loop.graphs = DecodeGraphs(loop.run, capture, tables, plan.slots, plan.page, model.device)
        try:
            while loop.slots.queue or loop.slots.living:
                loop.step()
        finally:
            loop.close()
    loop.stats.planned_bytes, loop.stats.slots, loop.stats.pages = plan.peak_bytes, plan.slots, plan.pages
    loop.stats.most_pages = plan.pages - arena.least_free
    trunk = None if loop.recorder is None else loop.recorder.done
    return Responses(loop.tokens, loop.logprobs, loop.finished, trunk, loop.stats)


class _Loop:
    """One rollout under way."""

    def __init__(self, model: PreTrainedModel, attention: Attention, slots: Slots, sampling: Sampling, count: int):
        self.model, self.base, self.head = model, base_of(model), head_of(model)
        self.attention, self.arena, self.slots, self.sampling = attention, attention.arena, slots, sampling
        self.device = model.device
        self.eos = torch.tensor(sorted(sampling.eos), dtype=torch.int64, device=self.device)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.finished = [False] * count
        self.stats = RolloutStats()
        self.seeds = torch.empty(0)
        self.texts: list[TextStream] = []
        self.on_token: Callable[[int, int, bool], None] | None = None
        self.recorder: Recorder | None = None
        self.graphs: DecodeGraphs | None = None
        self.panels: Tensor | None = None
        """The head's weight, packed."""

    def step(self) -> None:
        """Let in, run, draw, let out."""
        began = time.perf_counter()
        decoding = len(self.slots.living)
        came = self.slots.admit()
        hidden, living = self._hidden(decoding, came), len(self.slots.living)
        token, logprob = self._draw(hidden)
        ended = self._take(token, logprob)
        for sequence in ended:
            if self.recorder is not None:
                self.recorder.finish(sequence)
            self.slots.release(sequence)
        if ended:
            gone = set(map(id, ended))
            self.slots.living = [s for s in self.slots.living if id(s) not in gone]
        self._count(living, decoding, sum(len(p.tokens) for p, _ in came.starting), time.perf_counter() - began)

    def _hidden(self, decoding: int, came: Admission) -> Tensor:
        """(B, D): the state that each living sequence draws its next token from."""
        living = self.slots.living[:decoding]
        states = self._forward(living, came.starting) if living or came.starting else None
        if states is not None:
            at = decoding
            for prompt, _ in came.starting:
                if self.recorder is not None:
                    prompt.trunk = self.recorder.states[at : at + len(prompt.tokens)].clone()
                at += len(prompt.tokens)
                prompt.hidden = states[at - 1].clone()
            if self.recorder is not None:
                self.recorder.record(living)
        self.arena.copy_pages(*came.tails)
        if not came.sequences:
            assert states is not None
            return states
        fresh = torch.stack([s.prompt.hidden for s in came.sequences])  # type: ignore[misc]
        return fresh if states is None or not decoding else torch.cat([states[:decoding], fresh])

    def _forward(self, living: list[slotting.Sequence], starting: list[tuple[Prompt, int]]) -> Tensor:
        """(N, D) states of the newest tokens of `living`, then of all tokens of the prompts."""
        ids = [s.tokens[-1] for s in living]
        positions = [s.position for s in living]
        rows = [s.slot for s in living]
        longest = max(positions, default=-1) + 1
        for prompt, row in starting:
            ids += prompt.tokens
            positions += range(len(prompt.tokens))
            rows += [row] * len(prompt.tokens)
        outputs = None
        if self.graphs is not None and not starting:
            outputs = self.graphs.step(ids, positions, rows)
        if outputs is None:
            where = torch.tensor([ids, positions, rows], device=self.device)
            step = Step(
                tables=self.slots.tables.to(self.device),
                slots=where[2].int(),
                positions=where[1].int(),
                decoding=len(living),
                longest=longest,
                prompts=[len(p.tokens) for p, _ in starting],
            )
            outputs = self.run(where, step)
        if self.recorder is not None:
            self.recorder.states = outputs[1]
        return outputs[0]

    def run(self, where: Tensor, step: Step) -> tuple[Tensor, ...]:
        """(N, D) states after the last block, and if they are recorded (N, D) before another one, of the tokens with
        these ids, positions and table rows (3, N)."""
        self.attention.step = step
        states: Tensor = self.base(
            input_ids=where[:1], position_ids=where[1:2], past_key_values=self.arena, use_cache=True
        ).last_hidden_state[0]
        self.attention.check_all_served()
        return (states,) if self.recorder is None else (states, self.recorder.states)

    def _draw(self, hidden: Tensor) -> tuple[list[int], list[float]]:
        """A token and its logprob for each living sequence; the one transfer to the host of a step."""
        how, living = self.sampling, self.slots.living
        logits = self._logits(hidden)
        early = [row for row, s in enumerate(living) if len(s.tokens) < how.least]
        if early and len(self.eos):
            logits[torch.tensor(early, device=self.device)[:, None], self.eos] = -torch.inf
        which = torch.tensor([[s.index for s in living], [len(s.tokens) for s in living]], device=self.device)
        token, logprob, _, _ = K.sample(
            logits,
            self.seeds[which[0]],
            which[1],
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            impl=how.impl,
        )
        if self.device.type == "cpu":
            return token.tolist(), logprob.tolist()
        both = torch.stack([token.double(), logprob.double()]).tolist()  # exact: ids are far below 2^53
        return [int(t) for t in both[0]], both[1]

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.panels is None:
            return self.head.logits(hidden)
        return self.head.capped(packed_linear(hidden, self.panels, self.head.bias, len(self.head.weight)))

    def _take(self, tokens: list[int], logprobs: list[float]) -> list[slotting.Sequence]:
        """Give each sequence its token; returns those that end with it."""
        how, ended = self.sampling, []
        for sequence, token, logprob in zip(self.slots.living, tokens, logprobs, strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            stopped = token in how.eos
            if self.texts and not stopped:
                text = self.texts[sequence.index]
                stopped = text.ends_with_stop(how.stops, text.push(token)) and len(sequence.tokens) >= how.least
            last = stopped or len(sequence.tokens) == how.limit
            if self.on_token is not None:
                self.on_token(sequence.index, token, last)
            if last:
                i = sequence.index
                self.tokens[i], self.logprobs[i] = sequence.tokens, sequence.logprobs
                self.finished[i] = stopped
                ended.append(sequence)
        return ended

    def close(self) -> None:
        """Leave the model as it was, and give back what the phase's graphs hold."""
        if self.recorder is not None:
            self.recorder.hook.remove()
        if self.graphs is not None:
            self.graphs.close()

    def _count(self, living: int, decoding: int, prefill: int, seconds: float) -> None:
        stats, total = self.stats, decoding + prefill
        stats.steps += 1
        stats.occupied += living
        stats.prefill_tokens += prefill
        stats.decode_tokens += decoding
        share = prefill / total if total else 0.0
        stats.prefill_seconds += seconds * share
        stats.decode_seconds += seconds * (1.0 - share)


def _check(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uids: Sequence[int],
    sampling: Sampling,
    slots: int,
    tokenizer: PreTrainedTokenizerBase | None,
    trunk_layers: int | None,
) -> None:
    vocabulary = int(embedding_weight(model).shape[0])
    unknown = sorted(t for t in sampling.eos if not 0 <= t < vocabulary)
    empty = [i for i, p in enumerate(prompts) if not len(p)]
    for bad, message in (
        (len(uids) != len(prompts), f"{len(prompts)} prompts need as many uids, got {len(uids)}"),
        (empty, f"prompt {empty[:1]} is empty; a response needs at least one token before it (BOS will do)"),
        (
            unknown,
            f"stop token {unknown[:1]} is not in the model's vocabulary of {vocabulary}; give ids in "
            f"0..{vocabulary - 1}, or none",
        ),
        (sampling.limit < 1, f"max_new_tokens must be at least 1, got {sampling.limit}"),
        (slots < 1, f"slots must be at least 1, got {slots}"),
        (sampling.stops and tokenizer is None, "stop strings are looked for in text; pass tokenizer="),
        (any(not s for s in sampling.stops), "a stop string is empty; it would end every response"),
    ):
        if bad:
            raise RolloutError(f"rollout: {message}")
    if trunk_layers is not None and not 0 <= trunk_layers < len(blocks_of(model)):
        raise RolloutError(
            f"rollout: trunk_layers must be in 0..{len(blocks_of(model)) - 1} (the model's blocks), got {trunk_layers}"
        )


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
