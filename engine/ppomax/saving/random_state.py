"""The random generators of a process, as plain data and tensors, and back."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators: the engine draws from none of them, reward functions may."""
    import numpy

    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def random_state() -> dict[str, Tensor]:
    """torch's generators as uint8 tensors."""
    state = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["torch_cuda"] = torch.cuda.get_rng_state()
    return state


def python_random_state() -> dict[str, Any]:
    """Python's and numpy's generators as plain data."""
    import numpy

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }


def restore_random_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Undo `random_state` and `python_random_state`."""
    import numpy

    torch.set_rng_state(tensors["torch_cpu"])
    if "torch_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["torch_cuda"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = plain["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
