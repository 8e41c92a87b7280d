"""Between the host and the device without waiting: uploads from pinned memory, results that are read once they are
there. On a CPU plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)`; on a GPU queued, not waited for. The pinned memory is its
    allocator's, which keeps it until the copy is done."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x.to(device)`; from the host to a GPU queued, not waited for."""
    if x.device == device or not x.is_cpu:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Arriving:
    """Tensors on their way to the host."""

    def __init__(self, *tensors: Tensor):
        self.event: torch.cuda.Event | None = None
        if not tensors[0].is_cuda:
            self.there = tensors
            return
        self.there = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
        for there, x in zip(self.there, tensors, strict=True):
            there.copy_(x, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def lists(self) -> list[list[Any]]:
        """What they hold; waits until they are here."""
        if self.event is not None:
            self.event.synchronize()
        return [x.tolist() for x in self.there]
