"""Shift and scale to mean 0 and variance 1 over a mask: (x - mean) / sqrt(var + eps), var = sum (x - mean)^2 / count.
Two passes over x: moments (count, mean, squared deviations; fp64, Chan's combination, so any split gives the same),
then the map. Over a process group the moments of the ranks are combined first. Masked entries give 0 and are never
read into a result."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks, raw
from .backends import native, reference
from .dispatch import Table, late, pick
from .library import primitive

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MOMENTS: Table = {
    "cpu": native.moments_cpu,
    "triton": late("whiten_triton", "moments_triton"),
    "ref": reference.moments,
}
APPLY: Table = {
    "cpu": native.whiten_cpu,
    "triton": late("whiten_triton", "whiten_triton"),
    "ref": reference.whiten,
}
FORWARD = MOMENTS
"""As every op names its table; APPLY has the same back-ends."""


def _moments(x: Tensor, mask: Tensor | None, impl: str) -> Tensor:
    raw.place("whiten", impl, x, mask)
    raw.alike("whiten", x, mask)
    raw.mask("whiten", mask)
    return MOMENTS[impl](x, mask)  # type: ignore[no-any-return]


def _moments_shapes(x: Tensor, mask: Tensor | None, impl: str) -> Tensor:
    return x.new_empty((3,), dtype=torch.float64)


def _apply(x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, eps: float, impl: str) -> Tensor:
    raw.place("whiten", impl, x, mask, moments)
    raw.alike("whiten", x, mask)
    raw.mask("whiten", mask)
    raw.each("whiten", 3, moments)
    raw.typed("whiten", torch.float64, moments)
    return APPLY[impl](x, mask, moments, shift_mean, eps)  # type: ignore[no-any-return]


def _apply_shapes(x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, eps: float, impl: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


moments_op = primitive("moments", _moments, _moments_shapes, "Tensor")
whiten_op = primitive("whiten", _apply, _apply_shapes, "Tensor")


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    group: "ProcessGroup | None" = None,
    impl: str = "auto",
) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` with mean and population variance over the mask; `+ mean` again with
    `shift_mean=False`.

    x: any shape, float32, bfloat16 or float16, contiguous. mask: bool or uint8 of that shape. Returns float32 of that
    shape, 0 where masked.
    group: a torch.distributed process group; mean and variance are then those of all ranks together (every rank must
    call, also with no tokens). A single kept entry gives 0 (`shift_mean=False`: itself), none gives 0.
    Not differentiable.
    Raises TypeError for dtypes, ValueError for the rest.
    """
    op = "whiten"
    checks.tensor(op, x=x, mask=mask)
    checks.same_device(op, "x", x, mask=mask)
    checks.floating(op, impl, x=x)
    checks.mask_dtype(op, mask)
    checks.same_shape(op, "x", x.shape, mask=mask)
    checks.contiguous(op, x=x, mask=mask)
    checks.number(op, "eps", eps, 0.0, float("inf"), open_low=True)
    checks.no_gradient(op, x=x)
    name = pick(op, impl, x.device, MOMENTS)
    stats = reference.moments(x, mask) if name == "ref" else moments_op(x, mask, name)
    if group is not None:
        stats = combine_moments(gather_moments(stats, group))
    if name == "ref":
        return reference.whiten(x, mask, stats, shift_mean, eps)
    return whiten_op(x, mask, stats, shift_mean, eps, name)  # type: ignore[no-any-return]


def gather_moments(stats: Tensor, group: "ProcessGroup") -> Tensor:
    """(ranks, 3): the moments of every rank of the group, in rank order."""
    import torch.distributed as dist

    everyone = [torch.empty_like(stats) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, stats, group=group)
    return torch.stack(everyone)


def combine_moments(parts: Tensor) -> Tensor:
    """(K, 3) counts, means and squared deviations -> (3,) of all together (Chan, Golub, LeVeque 1979)."""
    count = parts[:, 0].sum()
    mean = (parts[:, 0] * parts[:, 1]).sum() / count.clamp(min=1.0)
    deviation = (parts[:, 2] + parts[:, 0] * (parts[:, 1] - mean) ** 2).sum()
    return torch.stack([count, mean, deviation])
