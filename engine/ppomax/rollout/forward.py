"""The next token of each sequence of a rollout: one forward of the newest token of each living sequence and of the
prompts that start, packed as one row; the head; the sampler. Token ids stay on the device from one step to the next, so
a step needs nothing of the one before it from the host. Steps without newcomers may be replayed from CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ppomax_kernels as K
import torch
from ppomax_kernels.internal.packed_linear import packed_linear
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.models import base_of, head_of
from ppomax.models.transfers import upload
from ppomax.rollout import slots as slotting
from ppomax.rollout.arena import Step
from ppomax.rollout.attention import Attention
from ppomax.rollout.graphs import Capture, DecodeGraphs
from ppomax.rollout.kept import kept_rows, only_kept, token_at
from ppomax.rollout.packed_weights import MOST_BYTES
from ppomax.rollout.recorder import KeptRecorder, Recorder
from ppomax.rollout.repetition import Repetition
from ppomax.rollout.sampling import Sampling
from ppomax.rollout.sizes import RolloutError
from ppomax.rollout.slots import Admission, Slots


class Draws(NamedTuple):
    """What tokens are drawn by."""

    sampling: Sampling
    seeds: Tensor
    """(sequences,) int64: each one's random stream."""
    eos: Tensor
    """Ids that are forbidden until `sampling.min_new_tokens` are out."""
    kept: KeptRecorder | None = None
    """Keeps what each token is drawn from."""
    repetition: Repetition | None = None
    """Makes tokens that were drawn before less likely."""
    exact: bool = False
    """Gives what scoring would of each token, to the bit: `Drawn.scored`."""


class Drawn(NamedTuple):
    """The tokens of a step."""

    token: Tensor
    """(B,); -1: the logits were no numbers."""
    logprob: Tensor
    """(B,) under the distribution drawn from."""
    scored: tuple[Tensor, ...] = ()
    """(B,) each, with `Draws.exact`: as `Exact` has them."""


class Extras(NamedTuple):
    """What a forward does besides."""

    panels: Tensor | None = None
    """The head's weight, packed; None: logits come from the head as it is."""
    capture: Capture | None = None
    """How steps without newcomers are captured; None: all of them are plain."""
    recorder: Recorder | None = None
    """Keeps what enters one block."""


class Forward:
    """The model of one rollout, with the arena that its layers attend through."""

    def __init__(self, model: PreTrainedModel, attention: Attention, slots: Slots, draws: Draws, extras: Extras):
        self.base, self.head, self.device = base_of(model), head_of(model), model.device
        self.attention, self.arena, self.slots, self.draws = attention, attention.arena, slots, draws
        self.panels, self.recorder = extras.panels, extras.recorder
        if draws.exact and self.panels is None:
            raise RolloutError(
                f"rollout: exact needs a model in float32 on a CPU whose weights are few enough to be packed, "
                f"{MOST_BYTES / 2**30:.0f} GiB; this one is in {model.dtype} on {model.device}. Leave exact off"
            )
        self.tables = slots.tables if self.device.type == "cpu" else slots.tables.to(self.device)
        self.newest = torch.zeros(len(self.tables), dtype=torch.int64, device=self.device)
        """The newest token of each slot's sequence."""
        self.graphs: DecodeGraphs | None = None
        if extras.capture is not None:
            page = None if attention.name == "triton" else self.arena.page
            self.graphs = DecodeGraphs(self._pair, extras.capture, self.newest, self.tables, slots.count, page)

    def tokens(self, living: Sequence[slotting.Sequence], came: Admission) -> Drawn:
        """A token for each of those that were `living` and those that came; valid until the next call."""
        if self.slots.changed and self.tables is not self.slots.tables:
            self.tables.copy_(self.slots.tables.pin_memory(), non_blocking=True)
        self.slots.changed = False
        everyone = [*living, *came.sequences]
        where = [[s.position for s in everyone], [s.slot for s in everyone]]
        where += [[s.index for s in everyone], [s.drawn for s in everyone]]
        longest = max((s.position for s in living), default=-1) + 1
        there, drawn = upload(where, self.device), None
        if self.graphs is not None and not came.sequences and (pair := self.graphs.step(there, longest)) is not None:
            drawn = Drawn(pair[0], pair[1])
        if drawn is None and came.sequences:
            drawn = self._with_newcomers(there, living, came, longest)
        elif drawn is None:
            drawn = self._next(self.newest[there[1]], there, longest)
        self.newest[there[1]] = drawn.token.clamp(min=0)
        return drawn

    def close(self) -> None:
        """Leave the model as it was, and give back what the phase's graphs hold."""
        if self.recorder is not None:
            self.recorder.hook.remove()
        if self.graphs is not None:
            self.graphs.close()

    def _pair(self, ids: Tensor, where: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """`_next` as graphs take it."""
        return self._next(ids, where, longest)[:2]

    def _next(self, ids: Tensor, where: Tensor, longest: int) -> Drawn:
        """For sequences whose newest tokens are `ids` (B,): where (4, B) holds their positions, slots, numbers and how
        many tokens are out. `longest`: no position is at or above it."""
        rows, positions = where[1].int(), where[0].int()
        step = Step(self.tables, rows, positions, decoding=len(rows), longest=longest, prompts=[])
        hidden = self._states(ids, where[0], step)
        if self.recorder is not None:
            self.recorder.record(where[1], where[3] - 1)
        return self._draw(hidden, where)

    def _with_newcomers(
        self, where: Tensor, living: Sequence[slotting.Sequence], came: Admission, longest: int
    ) -> Drawn:
        n, prompts = len(living), [p for p, _ in came.starting]
        ids, positions, rows = self.newest[where[1, :n]], where[0, :n], where[1, :n]
        states = None
        if prompts:
            tokens: list[int] = []
            at: list[int] = []
            theirs: list[int] = []
            for prompt, row in came.starting:
                tokens += prompt.tokens
                at += range(len(prompt.tokens))
                theirs += [row] * len(prompt.tokens)
            more = upload([tokens, at, theirs], self.device)
            ids, positions, rows = (torch.cat(pair) for pair in zip((ids, positions, rows), more, strict=True))
        if n or prompts:
            step = Step(
                tables=self.tables,
                slots=rows.int(),
                positions=positions.int(),
                decoding=n,
                longest=longest,
                prompts=[len(p.tokens) for p in prompts],
            )
            states = self._states(ids, positions, step)
            if self.recorder is not None:
                self.recorder.record(where[1, :n], where[3, :n] - 1)
            if prompts:
                self._keep_prompts(prompts, states, n)
        self.arena.copy_pages(*came.tails)
        fresh = torch.stack([s.prompt.hidden for s in came.sequences])  # type: ignore[misc]
        return self._draw(fresh if states is None or not n else torch.cat([states[:n], fresh]), where)

    def _keep_prompts(self, prompts: list[slotting.Prompt], states: Tensor, at: int) -> None:
        """What later steps need of prompts whose tokens stand in `states` from row `at` on."""
        ends = []
        for prompt in prompts:
            if self.recorder is not None:
                prompt.trunk = self.recorder.states[at : at + len(prompt.tokens)].clone()
            at += len(prompt.tokens)
            ends.append(at - 1)
        for prompt, hidden in zip(prompts, states[upload(ends, self.device)], strict=True):
            prompt.hidden = hidden

    def _states(self, ids: Tensor, positions: Tensor, step: Step) -> Tensor:
        """(N, D) after the last block, of the tokens with these ids (N,) and positions (N,)."""
        self.attention.step = step
        states: Tensor = self.base(
            input_ids=ids[None], position_ids=positions[None], past_key_values=self.arena, use_cache=True
        ).last_hidden_state[0]
        self.attention.check_all_served()
        return states

    def _draw(self, hidden: Tensor, where: Tensor) -> Drawn:
        """A token for each state (B, D) of the sequences in `where`."""
        (_, slot, _, drawn), repetition = where, self.draws.repetition
        product = self._product(hidden)
        logits = self.head.logits(hidden) if product is None else self.head.capped(product)
        if self.draws.exact and logits is product and (repetition is not None or self.draws.sampling.min_new_tokens):
            logits = logits.clone()  # the product is read again below
        if repetition is not None:
            logits = repetition.penalised(logits, slot, drawn)
        token, logprob = self._sample(logits, where)
        if repetition is not None:
            repetition.note(slot, drawn, token)
        return Drawn(token, logprob, self._scored(hidden, product, token) if self.draws.exact else ())

    def _product(self, hidden: Tensor) -> Tensor | None:
        """`hidden @ weight.T + bias` (B, V) of states (B, D), where the head's weight is packed."""
        if self.panels is None:
            return None
        return packed_linear(hidden, self.panels, self.head.bias, len(self.head.weight))

    def _scored(self, hidden: Tensor, product: Tensor | None, token: Tensor) -> tuple[Tensor, ...]:
        """What scoring gives of these tokens: the row kernel of the linear ops on the product that they make, which is
        another one where the head has a scale."""
        logits = product
        if self.head.scale != 1.0:
            states, bias = self.head.scaled(hidden)
            logits = packed_linear(states, self.panels, bias, len(self.head.weight))  # type: ignore[arg-type]
        assert logits is not None
        how: dict[str, Any] = {"softcap": self.head.softcap, "impl": self.draws.sampling.impl}
        temperature, label = float(self.draws.sampling.temperature), token.clamp(min=0)
        found: list[Tensor] = [*K.token_logprobs(logits, label, temperature=temperature, return_entropy=True, **how)]
        if temperature != 1.0:
            found.append(K.token_logprobs(logits, label, **how))  # type: ignore[arg-type]
        return tuple(found)

    def _sample(self, logits: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        (_, slot, index, drawn), sampling = where, self.draws.sampling
        if sampling.min_new_tokens and len(self.draws.eos):
            early = (drawn < sampling.min_new_tokens)[:, None]
            logits[:, self.draws.eos] = logits[:, self.draws.eos].masked_fill(early, -torch.inf)
        seeds, temperature = self.draws.seeds[index], float(sampling.temperature)
        recorder = self.draws.kept
        if recorder is None:
            top_k, top_p, impl = sampling.top_k, sampling.top_p, sampling.impl
            return K.sample(logits, seeds, drawn, temperature=temperature, top_k=top_k, top_p=top_p, impl=impl)[:2]
        kept = kept_rows(logits, recorder.cut)
        recorder.record(slot, drawn, kept)
        left = only_kept(logits, kept)
        column, logprob, _, _ = K.sample(left, seeds, drawn, temperature=temperature, impl=sampling.impl)
        return token_at(column, kept), logprob
