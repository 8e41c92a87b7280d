"""What a test puts in the place of a device's parts: a capture that records what a CUDA graph would."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ppomax.rollout import sizes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DECODE = importlib.import_module("ppomax.rollout.decode")
"""The module; the package gives its function by that name."""
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
"""Ops that on a device wait for it."""


class Tape(TorchDispatchMode):
    """The tensor operations of one run, which `replay` repeats on the same memory. As in a CUDA graph, what Python did
    in between is not repeated, an operation that reads the device or copies an array from the host is an error, and
    nothing is there after the capture that a replay does not compute."""

    def __init__(self, run: Callable[[], None]):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        with self:
            run()
        for out in self._fresh():
            if out.is_floating_point():
                out.fill_(torch.nan)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        host_array = func is torch.ops.aten.lift_fresh.default and args[0].ndim > 0
        if func in WAITS or host_array:
            raise RuntimeError(f"{func} cannot be captured")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            if _is_view(func):
                continue
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for there, now in zip(_tensors(out), _tensors(again), strict=True):
                    there.copy_(now)

    def _fresh(self) -> list[Tensor]:
        """What was made on the way, as against what was there before or is a view."""
        made = [out for func, _, _, out in self.calls if not _is_view(func) and not func._schema.is_mutable]
        return [x for out in made for x in _tensors(out)]


def _is_view(func: Any) -> bool:
    return not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def captures_by_tape(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """From here on, `cuda_graphs=True` on a CPU captures on tapes, with the model attending by `sdpa`; gives the tapes
    that were made."""
    tapes: list[Tape] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        run()  # the warm-up
        tapes.append(Tape(run))
        return tapes[-1].replay

    monkeypatch.setattr(DECODE, "capture_for", lambda device: capture)
    attend_by(monkeypatch, "sdpa")
    return tapes


def attend_by(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From here on, rollouts on a CPU attend by this implementation."""
    monkeypatch.setattr(sizes, "choose", lambda model, impl="auto": name)
