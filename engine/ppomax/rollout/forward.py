"""One forward of a rollout: the newest token of each living sequence, then the prompts that start, as one packed row,
plain or replayed from a CUDA graph; and from its states the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from ppomax_kernels.internal.packed_linear import packed_linear
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.models import base_of, head_of
from ppomax.rollout import slots as slotting
from ppomax.rollout.arena import Step
from ppomax.rollout.attention import Attention
from ppomax.rollout.graphs import Capture, DecodeGraphs
from ppomax.rollout.recorder import Recorder
from ppomax.rollout.slots import Admission, Prompt, Slots


class Extras(NamedTuple):
    """What a forward does besides."""

    panels: Tensor | None = None
    """The head's weight, packed; None: logits come from the head as it is."""
    capture: Capture | None = None
    """How steps without prompts are captured; None: all of them are plain."""
    recorder: Recorder | None = None
    """Keeps what enters one block."""


class Forward:
    """The model of one rollout, with the arena that its layers attend through."""

    def __init__(self, model: PreTrainedModel, attention: Attention, slots: Slots, extras: Extras):
        self.base, self.head, self.device = base_of(model), head_of(model), model.device
        self.attention, self.arena, self.slots = attention, attention.arena, slots
        self.panels, self.recorder = extras.panels, extras.recorder
        self.graphs: DecodeGraphs | None = None
        if extras.capture is not None:
            page = self.arena.page
            self.graphs = DecodeGraphs(self.run, extras.capture, slots.tables, slots.count, page, self.device)

    def hidden(self, living: list[slotting.Sequence], came: Admission) -> Tensor:
        """(B, D): the state that each sequence draws its next token from: those that were `living`, then those that
        came."""
        states = self._states(living, came.starting) if living or came.starting else None
        if states is not None:
            at = len(living)
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
        return fresh if states is None or not living else torch.cat([states[: len(living)], fresh])

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, V) of states (B, D)."""
        if self.panels is None:
            return self.head.logits(hidden)
        return self.head.capped(packed_linear(hidden, self.panels, self.head.bias, len(self.head.weight)))

    def run(self, where: Tensor, step: Step) -> tuple[Tensor, ...]:
        """(N, D) states after the last block, and if they are recorded (N, D) before another one, of the tokens with
        these ids, positions and table rows (3, N)."""
        self.attention.step = step
        states: Tensor = self.base(
            input_ids=where[:1], position_ids=where[1:2], past_key_values=self.arena, use_cache=True
        ).last_hidden_state[0]
        self.attention.check_all_served()
        return (states,) if self.recorder is None else (states, self.recorder.states)

    def close(self) -> None:
        """Leave the model as it was, and give back what the phase's graphs hold."""
        if self.recorder is not None:
            self.recorder.hook.remove()
        if self.graphs is not None:
            self.graphs.close()

    def _states(self, living: list[slotting.Sequence], starting: list[tuple[Prompt, int]]) -> Tensor:
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
