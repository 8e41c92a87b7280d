"""What is recorded while decoding: states on the way, for `hydra`, so that no one runs the blocks below again; and the
sets that a cut left to each draw."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.models import blocks_of
from ppomax.rollout.kept import Cut
from ppomax.rollout.slots import Sequence


class KeptRecorder:
    """Keeps the set of each draw (kept.py)."""

    def __init__(self, cut: Cut, slots: int, limit: int, count: int):
        self.cut = cut
        self.rows: Tensor | None = None
        self.size = (slots + 1, limit)
        self.done: list[Tensor] = [torch.empty(0)] * count

    def record(self, slots: Tensor, at: Tensor, kept: Tensor) -> None:
        """The sets (B, W) of the draws number `at` into their slots' rows; those of no slot into a last row."""
        if self.rows is None:
            self.rows = kept.new_empty(*self.size, kept.shape[1])
        self.rows[slots.clamp(max=self.size[0] - 1), at] = kept

    def finish(self, sequence: Sequence) -> None:
        """Those of a sequence that has ended."""
        assert self.rows is not None
        self.done[sequence.index] = self.rows[sequence.slot, : len(sequence.tokens)].clone()


class Recorder:
    """Keeps what enters one block while prompts and tokens go by."""

    def __init__(self, model: PreTrainedModel, layers: int, slots: int, limit: int, count: int):
        self.states = torch.empty(0)
        """(N, D) of the forward just run."""
        self.rows: Tensor | None = None
        self.size = (slots + 1, max(1, limit - 1))
        self.done: list[Tensor] = [torch.empty(0)] * count
        self.hook = blocks_of(model)[layers].register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.states = (args[0] if args else kwargs["hidden_states"])[0]

    def record(self, slots: Tensor, at: Tensor) -> None:
        """The states of newest tokens, the forward's first rows, into their slots' rows; those of no slot, which fill
        up a captured step, into a last row."""
        if self.rows is None:
            self.rows = self.states.new_empty(*self.size, self.states.shape[1])
        if len(slots):
            self.rows[slots.clamp(max=self.size[0] - 1), at] = self.states[: len(slots)]

    def finish(self, sequence: Sequence) -> None:
        """Prompt and response states of a sequence that has ended; its last token never went through the model."""
        assert self.rows is not None
        assert sequence.prompt.trunk is not None
        own = self.rows[sequence.slot, : len(sequence.tokens) - 1]
        self.done[sequence.index] = torch.cat([sequence.prompt.trunk, own])
