"""States on the way, for `hydra`: recorded while decoding, so that no one runs the blocks below again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.models import blocks_of
from ppomax.rollout import slots as slotting


class Recorder:
    """Keeps what enters one block while prompts and tokens go by."""

    def __init__(self, model: PreTrainedModel, layers: int, slots: int, limit: int, count: int):
        self.states = torch.empty(0)
        """(N, D) of the forward just run."""
        self.rows: Tensor | None = None
        self.size = (slots, max(1, limit - 1))
        self.done: list[Tensor] = [torch.empty(0)] * count
        self.hook = blocks_of(model)[layers].register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.states = (args[0] if args else kwargs["hidden_states"])[0]

    def record(self, living: list[slotting.Sequence]) -> None:
        """The states of newest tokens, into their sequences' rows."""
        if self.rows is None:
            self.rows = self.states.new_empty(*self.size, self.states.shape[1])
        if living:
            slot, at = torch.tensor([[s.slot for s in living], [len(s.tokens) - 1 for s in living]])
            self.rows[slot.to(self.rows.device), at.to(self.rows.device)] = self.states[: len(living)]

    def finish(self, sequence: slotting.Sequence) -> None:
        """Prompt and response states of a sequence that has ended; its last token never went through the model."""
        assert self.rows is not None
        assert sequence.prompt.trunk is not None
        own = self.rows[sequence.slot, : len(sequence.tokens) - 1]
        self.done[sequence.index] = torch.cat([sequence.prompt.trunk, own])
