"""Cosines and sines of rotary embeddings, looked up: a module's own answer for each position, asked for once in blocks
of positions, so that a position's numbers are the same to the bit in every forward, whatever stands beside it (a
vectorised cosine need not give the same for one number in another place), and a decoding step computes none.

Only for modules whose answer to a position is always the same: a rope type that depends on the sequence's length is
left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

BLOCK = 1024
CHANGING = ("dynamic", "longrope")
"""Rope types whose frequencies depend on the longest position of a call."""

_tables: WeakKeyDictionary[nn.Module, RotaryTable] = WeakKeyDictionary()


def rotary_table(module: nn.Module) -> Callable[..., Any] | None:
    """What gives the module's answers from a table; None for a module that is no rotary embedding, or one whose
    answers change."""
    kind = getattr(module, "rope_type", None)
    if not type(module).__name__.endswith("RotaryEmbedding") or not isinstance(kind, str) or kind in CHANGING:
        return None
    if module not in _tables:
        _tables[module] = RotaryTable()
    table, real = _tables[module], type(module).forward

    def forward(x: Tensor, position_ids: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or x.dtype != torch.float32 or not x.is_cpu:
            return real(module, x, position_ids, *rest, **named)
        return table.at(module, x, position_ids)

    return forward


class RotaryTable:
    """Cosines and sines of the positions that were asked for so far, and those of their blocks."""

    def __init__(self) -> None:
        self.cosine = self.sine = torch.empty(0)
        self.frequencies: Tensor | None = None

    def at(self, module: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) -> (B, T, D) each."""
        frequencies = module.inv_freq
        if self.frequencies is None or not torch.equal(self.frequencies, frequencies):  # type: ignore[arg-type]
            self.cosine = self.sine = torch.empty(0)
            self.frequencies = frequencies.clone()  # type: ignore[operator]
        while len(self.cosine) <= int(position_ids.max()):
            block = torch.arange(len(self.cosine), len(self.cosine) + BLOCK, device=x.device)[None]
            cosine, sine = type(module).forward(module, x[:1, :1], block)
            self.cosine, self.sine = (
                torch.cat([self.cosine.view(-1, cosine.shape[-1]), cosine[0]]),
                torch.cat([self.sine.view(-1, sine.shape[-1]), sine[0]]),
            )
        return self.cosine[position_ids], self.sine[position_ids]
