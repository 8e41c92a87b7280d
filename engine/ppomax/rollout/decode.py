"""Continuous batching over the KV arena: every forward takes one token of each living sequence and the prompts that
start, as one packed row; what ends gives its slot to the next.

    admit -> forward (last tokens | new prompts) -> head -> one fused sampler -> ids to the host -> release

Nothing is padded, so the work of a step is its tokens. A sequence's draws come from a random stream of its own, so its
tokens do not depend on slots, order or neighbours (beyond the rounding of GEMMs of another height). Any HF causal LM
whose attention goes through transformers' interface; no per-family code. On a GPU the host reads a step's tokens after
it has queued the next one: a sequence that ended takes part in one step more, whose token is dropped. Steps without
newcomers may be replayed from CUDA graphs (graphs.py), which round the rows up; then newcomers have steps of their
own."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.models import blocks_of, embedding_weight
from ppomax.models.transfers import Arriving
from ppomax.rollout import slots as slotting
from ppomax.rollout.arena import Arena
from ppomax.rollout.attention import arena_attention, choose
from ppomax.rollout.forward import Draws, Extras, Forward
from ppomax.rollout.gpu_trunk import gpu_trunk
from ppomax.rollout.graphs import capture_for
from ppomax.rollout.packed_weights import packed_trunk
from ppomax.rollout.recorder import KeptRecorder, Recorder
from ppomax.rollout.repetition import Repetition
from ppomax.rollout.responses import Responses, RolloutStats
from ppomax.rollout.sampling import Sampling
from ppomax.rollout.sizes import RolloutError, RolloutSizes, rollout_sizes
from ppomax.rollout.slots import Admission, Slots
from ppomax.rollout.streams import stream_seeds
from ppomax.rollout.text import TextStream

NOBODY = Admission([], [], ([], []))
OnToken = Callable[[int, int, bool], None]
"""Told each token of sequence i as it comes: (i, token, whether it is the last one)."""


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uids: Sequence[int],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    trunk_layers: int | None = None,
    announce: Callable[[RolloutSizes], None] | None = None,
    on_token: OnToken | None = None,
) -> Responses:
    """Sample one response to each prompt (token ids, none empty). Equal prompts are prefilled once, however many
    responses they get.

    uids: one number a sequence, which with `sampling.seed` names its random stream: the draws depend on (seed, uid,
    position) alone, so neither on batch, slot or rank, and no generator has a state to save. eos_ids: tokens that end a
    response; none: only `sampling.stop` and the limit do. tokenizer: needed to find stop strings.
    trunk_layers=b: keep what enters block b (`Responses.trunk`). announce: told the sizes, memory included, before
    anything is allocated. Raises RolloutError for prompts, ends or sizes that cannot be served."""
    ends = frozenset(eos_ids)
    _check(model, prompts, uids, ends, sampling, tokenizer, trunk_layers)
    graphs = sampling.cuda_graphs
    if graphs is None:
        graphs = model.device.type == "cuda" and choose(model, sampling.impl) == "triton"
    sampling = dataclasses.replace(sampling, cuda_graphs=graphs)
    capture = capture_for(model.device) if graphs else None
    if not prompts:
        nothing: list[Any] = [None if x is None else [] for x in (trunk_layers, sampling.cut, sampling.exact or None)]
        return Responses([], [], [], *nothing)
    distinct = slotting.grouped(prompts)
    sizes = rollout_sizes(model, distinct, sampling, trunk=trunk_layers is not None)
    if announce is not None:
        announce(sizes)
    arena = Arena(model.config, sizes.pages, model.dtype, model.device, sizes.page, scratch=graphs)
    texts = [TextStream(tokenizer) for _ in prompts] if sampling.stop else []  # type: ignore[arg-type]
    with ExitStack() as phase:
        attention = phase.enter_context(arena_attention(model, arena, sizes.attention))
        ours = gpu_trunk(model) if sizes.attention == "triton" else packed_trunk(model, attention)
        panels = phase.enter_context(ours)
        recorder = None
        if trunk_layers is not None:
            recorder = Recorder(model, trunk_layers, sizes.slots, sampling.max_new_tokens, len(prompts))
        slots = Slots(distinct, sizes.slots, sampling.max_new_tokens, arena)
        eos = torch.tensor(sorted(ends), dtype=torch.int64, device=model.device)
        cut, kept = sampling.cut, None
        if cut is not None:
            kept = KeptRecorder(cut, sizes.slots, sampling.max_new_tokens, len(prompts))
        repetition = None
        if sampling.repetition_penalty != 1:
            repetition = Repetition(sampling.repetition_penalty, sizes.slots, sampling.max_new_tokens, model.device)
        seeds = stream_seeds(sampling.seed, uids).to(model.device)
        draws = Draws(sampling, seeds, eos, kept, repetition, sampling.exact)
        forward = Forward(model, attention, slots, draws, Extras(panels, capture, recorder))
        loop = _Loop(forward, len(prompts), ends, texts, on_token)
        try:
            while slots.queue or slots.living:
                loop.step()
        finally:
            forward.close()
    loop.stats.planned_bytes, loop.stats.slots, loop.stats.pages = sizes.peak_bytes, sizes.slots, sizes.pages
    loop.stats.most_pages = sizes.pages - arena.least_free
    recorded = None if recorder is None else recorder.done
    return Responses(
        loop.tokens,
        loop.logprobs,
        loop.finished,
        recorded,
        None if kept is None else kept.done,
        loop.scored if sampling.exact else None,
        loop.stats,
    )


def reads_late(device: torch.device) -> bool:
    """Whether the host reads a step's tokens after it has queued the next one."""
    return device.type != "cpu"


class _Loop:
    """One rollout under way."""

    def __init__(
        self, forward: Forward, count: int, ends: frozenset[int], texts: list[TextStream], on_token: OnToken | None
    ):
        self.forward, self.slots, self.sampling = forward, forward.slots, forward.draws.sampling
        self.ends, self.texts, self.on_token = ends, texts, on_token
        self.coming: deque[tuple[list[slotting.Sequence], Arriving]] = deque()
        """Drawn tokens that the host has not read, by step, and whose they are."""
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.finished = [False] * count
        self.scored = [torch.empty(0)] * count
        self.told = [0] * count
        """Tokens of each that `on_token` knows."""
        self.stats = RolloutStats()

    def step(self) -> None:
        """Admit, draw, read, release."""
        began = time.perf_counter()
        before = self._going_on()
        if self.slots.grows:
            if self.slots.lacks(before):  # some may have ended
                while self.coming:
                    self._read()
                before = self._going_on()
            if put_back := self.slots.grow(before):
                self._start_anew(put_back)
                before = self._going_on()
        came = self.slots.admit()
        unread = len(self.coming)
        if self.forward.graphs is not None and came.sequences and before:
            self._draw([], came)
            self._draw(before, NOBODY)
        elif came.sequences or before:
            self._draw(before, came)
        late = len(self.coming) > unread and reads_late(self.forward.device)
        for _ in range(unread if late else len(self.coming)):
            self._read()
        prefill = sum(len(p.tokens) for p, _ in came.starting)
        living = len(before) + len(came.sequences)
        self.stats.note(living, len(before), prefill, time.perf_counter() - began)

    def _going_on(self) -> list[slotting.Sequence]:
        return [s for s in self.slots.living if s.drawn < self.sampling.max_new_tokens]

    def _start_anew(self, put_back: list[slotting.Sequence]) -> None:
        """Forget what was drawn of sequences that had to give up their pages."""
        self.stats.put_back += len(put_back)
        for sequence in put_back:
            if self.texts:
                self.texts[sequence.index] = TextStream(self.texts[sequence.index].tokenizer)

    def _draw(self, living: list[slotting.Sequence], came: Admission) -> None:
        drawn = self.forward.tokens(living, came)
        drawers = [*living, *came.sequences]
        for sequence in drawers:
            sequence.drawn += 1
        self.coming.append((drawers, Arriving(drawn.token, drawn.logprob, *drawn.scored)))

    def _read(self) -> None:
        """The oldest step that was not read: give each sequence its token, and release those that end with it."""
        drawers, arriving = self.coming.popleft()
        ended = self._take(drawers, *arriving.lists())
        for sequence in ended:
            if self.forward.recorder is not None:
                self.forward.recorder.finish(sequence)
            if self.forward.draws.kept is not None:
                self.forward.draws.kept.finish(sequence)
            self.slots.release(sequence)
        if ended:
            self.slots.living = [s for s in self.slots.living if not s.ended]

    def _take(
        self, drawers: list[slotting.Sequence], tokens: list[int], logprobs: list[float], *scored: list[float]
    ) -> list[slotting.Sequence]:
        """Give each sequence its token; returns those that end with it."""
        sampling, ended = self.sampling, []
        for sequence, token, logprob, *more in zip(drawers, tokens, logprobs, *scored, strict=True):
            if sequence.ended:
                continue
            if token < 0:
                raise RolloutError(
                    f"rollout: the logits of sequence {sequence.index} are not numbers at its token "
                    f"{len(sequence.tokens)}; look for NaN in the policy's weights, or sample in another dtype"
                )
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.scored.append(tuple(more))
            stopped = token in self.ends
            if self.texts and not stopped:
                text = self.texts[sequence.index]
                met = text.ends_with_stop(sampling.stop, text.push(token))
                stopped = met and len(sequence.tokens) >= sampling.min_new_tokens
            sequence.ended = stopped or len(sequence.tokens) == sampling.max_new_tokens
            if self.on_token is not None and len(sequence.tokens) > self.told[sequence.index]:
                self.told[sequence.index] += 1
                self.on_token(sequence.index, token, sequence.ended)
            if sequence.ended:
                i = sequence.index
                self.tokens[i], self.logprobs[i] = sequence.tokens, sequence.logprobs
                self.finished[i] = stopped
                self.scored[i] = torch.tensor(sequence.scored)
                ended.append(sequence)
        return ended


def _check(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uids: Sequence[int],
    ends: frozenset[int],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None,
    trunk_layers: int | None,
) -> None:
    vocabulary = int(embedding_weight(model).shape[0])
    unknown = sorted(t for t in ends if not 0 <= t < vocabulary)
    empty = [i for i, p in enumerate(prompts) if not len(p)]
    for bad, message in (
        (len(uids) != len(prompts), f"{len(prompts)} prompts need as many uids, got {len(uids)}"),
        (empty, f"prompt {empty[:1]} is empty; a response needs at least one token before it (BOS will do)"),
        (
            unknown,
            f"stop token {unknown[:1]} is not in the model's vocabulary of {vocabulary}; give ids in "
            f"0..{vocabulary - 1}, or none",
        ),
        (sampling.max_new_tokens < 1, f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}"),
        (sampling.slots < 1, f"slots must be at least 1, got {sampling.slots}"),
        (sampling.stop and tokenizer is None, "stop strings are looked for in text; pass tokenizer="),
        (
            not sampling.repetition_penalty > 0,
            f"repetition_penalty must be above 0 (1: off), got {sampling.repetition_penalty}",
        ),
        (any(not s for s in sampling.stop), "a stop string is empty; it would end every response"),
    ):
        if bad:
            raise RolloutError(f"rollout: {message}")
    if trunk_layers is not None and not 0 <= trunk_layers < len(blocks_of(model)):
        raise RolloutError(
            f"rollout: trunk_layers must be in 0..{len(blocks_of(model)) - 1} (the model's blocks), got {trunk_layers}"
        )
