"""A model's weights by name, read and written one at a time, be they whole here or cut over the ranks by ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppomax.sharding import ranks


@dataclass(frozen=True)
class Lazy:
    """A tensor that is whole only while it is looked at. One that is cut over the ranks has `own`, and `get` must then
    be called by every rank, in one order."""

    dtype: torch.dtype
    shape: torch.Size
    get: Callable[[], Tensor]
    own: Callable[[], tuple[int, Tensor]] | None = None
    """Of one that is cut over the ranks: where this rank's stretch begins in the flat tensor, and its numbers, (n,)."""

    @classmethod
    def of(cls, x: Tensor) -> Lazy:
        """One that is there already."""
        return cls(x.dtype, x.shape, lambda: x.detach())


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


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What training may change, by name: trained parameters (tied ones once) and persistent buffers. Frozen ones are
    those of the model that the run started from."""
    return {n: x for n, x in all_tensors(module).items() if x.requires_grad or not isinstance(x, nn.Parameter)}


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    persistent = module.state_dict().keys()
    return {**dict(module.named_parameters()), **{n: b for n, b in module.named_buffers() if n in persistent}}


def made_weights(module: nn.Module) -> dict[str, Lazy]:
    """Weights that are no parameters: their layers store them in another form, and know their `lazy_weight`."""
    return {f"{n}.weight": m.lazy_weight() for n, m in module.named_modules() if hasattr(m, "lazy_weight")}


def shape_in(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    """Of a whole tensor, without reading it where `tensors` knows it otherwise."""
    known = getattr(tensors, "shape", None)
    return known(name) if known is not None else tensors[name].shape  # type: ignore[no-any-return]


def stretch_in(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """`tensors[name].flatten()[start:stop]`, without reading the rest where `tensors` can."""
    known = getattr(tensors, "stretch", None)
    return known(name, start, stop) if known is not None else tensors[name].flatten()[start:stop]  # type: ignore[no-any-return]


def check_names(targets: Mapping[str, torch.Size], names: Mapping[str, Any]) -> None:
    """ValueError naming what is in one and not in the other."""
    odd = sorted(targets.keys() ^ names.keys())
    if odd:
        raise ValueError(
            f"weights do not fit the model: {odd[0]} is in one and not in the other ({len(odd)} such names)"
        )


def check_shape(name: str, got: torch.Size, want: torch.Size) -> None:
    """ValueError unless a tensor has the shape that the model wants."""
    if got != want:
        raise ValueError(f"weights do not fit the model: {name} is {tuple(got)}, the model wants {tuple(want)}")


def lazy_weights(module: nn.Module) -> dict[str, Lazy]:
    """Every parameter (tied ones once), persistent buffer and made weight by name."""
    return {name: lazy_weight(x) for name, x in all_tensors(module).items()} | made_weights(module)


def copy_into(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write what training may change of `module`, and nothing else; ValueError names what is missing, unknown or of
    another shape."""
    write_tensors(named_tensors(module), weights)


def overwrite(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The same of all that `module` holds."""
    write_tensors(all_tensors(module), weights)


@torch.no_grad()
def write_tensors(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of their names, be they whole or cut; ValueError as of `copy_into`."""
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
