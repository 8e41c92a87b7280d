"""A model's weights by name, read and written one at a time, be they whole here or cut over the ranks by ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ppomax.sharding import ranks
from ppomax.sharding.plain import Lazy, all_tensors, check_names, check_shape, shape_in, stretch_in


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made whole when it is asked for: by every rank, in one order."""

    def __init__(self, lazy: Mapping[str, Lazy]):
        self.lazy = lazy

    def __getitem__(self, name: str) -> Tensor:
        return self.lazy[name].get()

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        return self.lazy[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self.lazy)

    def __len__(self) -> int:
        return len(self.lazy)


def lazy_weights(module: nn.Module) -> dict[str, Lazy]:
    """Every parameter (tied ones once) and persistent buffer by name."""
    return {name: lazy_weight(x) for name, x in all_tensors(module).items()}


@torch.no_grad()
def overwrite(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy named weights into `module`, all of it; ValueError names what is missing, unknown or of another shape."""
    targets = all_tensors(module)
    check_names({name: shape_of(x) for name, x in targets.items()}, weights)
    for name, target in targets.items():
        check_shape(name, shape_in(weights, name), shape_of(target))
        write_weight(target, weights, name)


def shape_of(x: Tensor) -> torch.Size:
    return getattr(x, "ds_shape", x.shape)  # type: ignore[no-any-return]


def lazy_weight(x: Tensor) -> Lazy:
    if not hasattr(x, "ds_id"):
        return Lazy.of(x)

    def get() -> Tensor:
        import deepspeed

        if x.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]  # all are, or this small one is kept
            return x.detach().clone()
        with deepspeed.zero.GatheredParameters([x]):
            return x.detach().clone()

    def own() -> tuple[int, Tensor]:
        return cut_off(x, x.ds_tensor.detach())  # type: ignore[attr-defined]

    return Lazy(x.dtype, shape_of(x), get, own)


def cut_off(p: Tensor, part: Tensor) -> tuple[int, Tensor]:
    """Where a partition of ZeRO-3 begins, and its numbers without the padding after the last."""
    start = ranks.rank() * part.numel()
    return start, part.flatten()[: max(0, shape_of(p).numel() - start)]


@torch.no_grad()
def write_weight(target: Tensor, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copy a whole tensor into a parameter or buffer, or this rank's part of it into a partition."""
    if hasattr(target, "ds_id"):
        target.ds_tensor.copy_(part_of(target, tensors, name))  # type: ignore[attr-defined]
        target.ds_secondary_tensor = None  # type: ignore[attr-defined]  # hpZ's copy of what was there; it is made anew
        if target.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]  # kept whole beside its partition
            target.copy_(tensors[name])
    else:
        target.copy_(tensors[name])


def part_of(p: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """This rank's partition of a whole tensor, padded with zeros as ZeRO-3 pads."""
    count, whole = p.ds_tensor.numel(), shape_of(p).numel()  # type: ignore[attr-defined]
    start = min(ranks.rank() * count, whole)
    flat = stretch_in(tensors, name, start, min(start + count, whole))
    return nn.functional.pad(flat, (0, count - len(flat)))
