"""The repetition penalty of Keskar et al. (CTRL, arXiv 1909.05858) over the tokens that a response holds, not its
prompt's. Scoring knows nothing of it, so ratio and KL are those of another distribution than the sampler's."""

from __future__ import annotations

import torch
from torch import Tensor


class Repetition:
    """Remembers the drawn tokens of each slot, on the device, at fixed shapes."""

    def __init__(self, penalty: float, slots: int, limit: int, device: torch.device):
        self.penalty = penalty
        self.drawn = torch.zeros(slots + 1, limit, dtype=torch.int64, device=device)

    def penalised(self, logits: Tensor, slots: Tensor, at: Tensor) -> Tensor:
        """(B, V) logits of the draws number `at` of these slots, with those of tokens already drawn divided by the
        penalty where they are above 0, and multiplied by it where not."""
        rows = self.drawn[slots.clamp(max=len(self.drawn) - 1)]
        out_of_it = logits.shape[1]  # a column that is cut off again takes what is not drawn yet
        rows = rows.masked_fill(torch.arange(rows.shape[1], device=rows.device) >= at[:, None], out_of_it)
        seen = torch.zeros(len(logits), out_of_it + 1, dtype=torch.bool, device=logits.device)
        seen = seen.scatter_(1, rows, True)[:, :out_of_it]
        return torch.where(seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)

    def note(self, slots: Tensor, at: Tensor, tokens: Tensor) -> None:
        """Tokens (B,) drawn as number `at`; those of no slot go into a last row."""
        self.drawn[slots.clamp(max=len(self.drawn) - 1), at] = tokens.clamp(min=0)
