"""Models that lie on the host while a phase does without them (`sharding.idle`): reference, reward model, critic, and
the critic's optimiser. The policy stays, and what others share with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ppomax.config import ShardingConfig
from ppomax.sharding.plain import Trained


class Idle:
    """Moves the weights of `models`, by their names, as phases need them; those that `keep` has stay. A tensor stays
    the object that it is and changes its storage alone."""

    def __init__(self, models: Mapping[str, Any], keep: Any, device: torch.device, config: ShardingConfig):
        self.models, self.keep, self.device = dict(models), keep, device
        self.moves = config.idle == "host"
        self.pinned: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """Tensor -> its place on the host, which is made once."""

    @torch.no_grad()
    def work_with(self, *names: str) -> None:
        """Have these models where they compute, and the others on the host; if that is asked for."""
        if not self.moves:
            return
        wanted = _by_id(x for name in names for x in tensors_of(self.models[name]))
        kept = _by_id(tensors_of(self.keep))
        others = _by_id(x for model in self.models.values() for x in tensors_of(model))
        for key, x in others.items():
            if key not in wanted and key not in kept:
                self.send(x)
        for x in wanted.values():
            self.bring(x)

    def send(self, x: Tensor) -> None:
        """To the host, unless it lies there."""
        if x.device.type == "cpu":
            return
        place = self.pinned.get(x)
        if place is None or place.shape != x.shape:
            place = self.pinned[x] = torch.empty_like(x, device="cpu", pin_memory=True)
        place.copy_(x)  # whole when this returns, so that its room on the device may be given away
        x.data = place

    def bring(self, x: Tensor) -> None:
        """To the device, unless it lies there."""
        if x.device != self.device:
            x.data = x.data.to(self.device, non_blocking=True)


def tensors_of(model: Any) -> list[Tensor]:
    """All that a model, trained or not, holds; with the model that it stands on, if it borrows one."""
    if model is None:
        return []
    module: nn.Module = model.module if isinstance(model, Trained) else model
    found = [*module.parameters(), *module.buffers()]
    base = getattr(module, "base", None)
    if isinstance(base, nn.Module):
        found += [*base.parameters(), *base.buffers()]
    if isinstance(model, Trained):
        found += model.copies
        found += [x for state in model.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return found


def _by_id(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    return {id(x): x for x in tensors}
