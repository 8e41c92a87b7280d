"""Bytes of live tensors, counted as torch makes and drops them: figures without noise, unlike resident memory."""

from __future__ import annotations

from typing import Any


def live_bytes(device: str = "cpu") -> Any:
    """A context that counts the bytes of tensors made inside it on `device` and still alive: `.now`, `.peak`.

    Each storage counts once, whatever views it has; scratch memory inside C++ operators is not seen. `meta`: of a run
    without data."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        now = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.alive: dict[int, tuple[Any, int]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.device.type == device:
                    self.note(x.untyped_storage(), old)
            self.peak = max(self.peak, self.now)
            return out

        def note(self, storage: Any, old: set[int]) -> None:
            key = storage._cdata
            if key in old or key in self.alive:
                return
            size = storage.nbytes()
            self.alive[key] = (weakref.ref(storage, lambda _: self.drop(key)), size)
            self.now += size

        def drop(self, key: int) -> None:
            self.now -= self.alive.pop(key)[1]

    return Live()
