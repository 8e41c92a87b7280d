"""In which order rows are taken: a function of the seed and a position, so that a resumed run needs nothing else."""

from __future__ import annotations

import torch

from ppomax.recipe.streams import Purpose, stream


class Order:
    """An endless order over n items: one seeded permutation after the other. Any stretch can be had from its position
    alone."""

    def __init__(self, n: int, seed: int, purpose: Purpose = Purpose.PROMPTS):
        self.n, self.seed, self.purpose = n, seed, purpose
        self._epoch, self._permutation = -1, list[int]()

    def take(self, start: int, count: int) -> list[int]:
        """Items `start` to `start + count`."""
        return [self._of_epoch(i // self.n)[i % self.n] for i in range(start, start + count)]

    def _of_epoch(self, epoch: int) -> list[int]:
        if self._epoch != epoch:
            shuffle = stream(self.seed, self.purpose, epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.n, generator=shuffle).tolist()
        return self._permutation
