"""Every shuffle of a run as a stream of its own: a function of the run's seed, of what it is for and of a number (an
epoch, a buffer), so that a resumed run needs no generator's state. Sampling has streams of its own
(ppomax.rollout: one a sequence)."""

from __future__ import annotations

from enum import Enum

import torch


class Purpose(Enum):
    """What a stream shuffles; `n` counts what is named last."""

    PROMPTS = "the order of prompts, by epoch"
    TEXTS = "the order of ptx texts, by epoch"
    ROWS = "the rows of supervised training, by epoch"
    CRITIC_EPOCHS = "minibatches of critic pre-training, by buffer"
    MINIBATCHES = "a buffer's minibatches, by buffer"
    EPOCHS = "minibatches of the epochs after the first, by buffer"


_STRIDE = 1_000_003
_PLACES = {  # seed -> (seed * _STRIDE + n) * factor + offset; fixed, since a resumed run must find the same numbers
    Purpose.PROMPTS: (1, 0),
    Purpose.TEXTS: (1, _STRIDE),
    Purpose.ROWS: (1, 0),
    Purpose.CRITIC_EPOCHS: (1, 0),
    Purpose.MINIBATCHES: (2, 0),
    Purpose.EPOCHS: (2, 1),
}


def stream(seed: int, purpose: Purpose, n: int) -> torch.Generator:
    """The generator of number `n` of `purpose` in a run of this seed."""
    factor, offset = _PLACES[purpose]
    return torch.Generator().manual_seed((seed * _STRIDE + n) * factor + offset)
