"""In which order rows are taken: a function of the seed and a position, so that a resumed run needs nothing else."""

from __future__ import annotations

import torch


class Order:
    """An endless order over n items: one seeded permutation after the other. Any stretch can be had from its position
    alone."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed

    def take(self, start: int, count: int) -> list[int]:
        """Items `start` to `start + count`."""
        return [self._permutation(i // self.n)[i % self.n] for i in range(start, start + count)]

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=shuffle).tolist()
        return self._order
