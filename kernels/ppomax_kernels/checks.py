"""Argument checks shared by the ops, in one order: device, dtype, rank, shape, layout, range. Each message names op
and argument, what was wanted, what came, and the mend. TypeError for a wrong dtype, ValueError for the rest. Values
of tensors are not read here (on a GPU that would stall the queue): kernels check labels and cu_seqlens where reading
them is free."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def plain(mask: Tensor | None, first: Tensor, *others: Tensor | None) -> bool:
    """True if the checks of type, device, dtype, shape and layout have nothing to say, as nearly always: contiguous
    float32 tensors of one shape on one device, and such a mask. A third of the time that they take one by one."""
    if type(first) is not Tensor or first.dtype != torch.float32 or not first.is_contiguous():
        return False
    shape, device = first.shape, first.device
    for x in others:
        if x is not None and (
            type(x) is not Tensor
            or x.dtype != torch.float32
            or x.shape != shape
            or x.device != device
            or not x.is_contiguous()
        ):
            return False
    return mask is None or (
        type(mask) is Tensor
        and mask.dtype == torch.bool
        and mask.shape == shape
        and mask.device == device
        and mask.is_contiguous()
    )


def tensor(op: str, **named: Tensor | None) -> None:
    for name, x in named.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(
                f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}; wrap it with torch.as_tensor"
            )
        if x is not None and type(x) is not Tensor:
            whole(op, name, x)


def whole(op: str, name: str, x: Tensor) -> None:
    """That a parameter of a sharded trainer is here as a whole, and plain: its part would be another tensor."""
    if hasattr(x, "device_mesh"):
        raise TypeError(
            f"{op}: {name} is a DTensor; pass {name}.full_tensor(grad_placements=[Partial()]), which sums the ranks' "
            "gradients (without it each rank keeps a slice of its own)"
        )
    if hasattr(x, "ds_id") and not x.numel():
        raise ValueError(
            f"{op}: {name} is cut over the ranks by ZeRO-3 and empty here; call inside "
            "deepspeed.zero.GatheredParameters, or register it by deepspeed.zero.register_external_parameter"
        )


def same_device(op: str, first: str, x: Tensor, **others: Tensor | None) -> None:
    for name, y in others.items():
        if y is not None and y.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on {x.device} like {first}, got {y.device}; move it with "
                f"{name}.to({first}.device)"
            )


def floating(op: str, impl: str, /, **named: Tensor | None) -> None:
    """float32, bfloat16 or float16; the reference takes float64 too, for gradcheck."""
    for name, x in named.items():
        if x is not None and x.dtype not in FLOATS and not (impl == "ref" and x.dtype == torch.float64):
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16 or float16, got {_dt(x)}; cast it with {name}.float()"
            )


def dtype(op: str, name: str, x: Tensor, wanted: torch.dtype) -> None:
    if x.dtype != wanted:
        raise TypeError(f"{op}: {name} must be {str(wanted)[6:]}, got {_dt(x)}; cast it with {name}.to({wanted})")


def mask_dtype(op: str, mask: Tensor | None) -> None:
    if mask is not None and mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{op}: mask must be bool or uint8, got {_dt(mask)}; pass mask.bool()")


def same_shape(op: str, first: str, shape: Sequence[int], **others: Tensor | None) -> None:
    for name, y in others.items():
        if y is not None and y.shape != torch.Size(shape):
            raise ValueError(
                f"{op}: {name} must have shape {tuple(shape)} like {first}, got {tuple(y.shape)}; slice or expand it "
                "to match"
            )


def contiguous(op: str, **named: Tensor | None) -> None:
    for name, x in named.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous, got shape {tuple(x.shape)} with strides {tuple(x.stride())}; pass "
                f"{name}.contiguous()"
            )


def rows(op: str, name: str, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int, int]:
    """Leading dimensions as two levels, without a copy: (outer, inner, outer stride, inner stride) in elements."""
    n = len(shape)
    if n == 1:
        return 1, shape[0], 0, strides[0]
    if n == 2:
        return shape[0], shape[1], strides[0], strides[1]
    if n == 0:
        return 1, 1, 0, 0
    for i in range(n - 2):
        if shape[i] > 1 and strides[i] != shape[i + 1] * strides[i + 1]:
            raise ValueError(
                f"{op}: {name} of shape {tuple(shape)} (rows) with strides {tuple(strides)} cannot be walked as two "
                "dimensions; "
                f"flatten its leading dimensions or pass {name}.contiguous()"
            )
    return math.prod(shape[:-1]), shape[-1], strides[-2], strides[-1]


def unit_stride(op: str, name: str, x: Tensor) -> None:
    if x.stride()[-1] != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{op}: the last dimension of {name} must be contiguous, got strides {tuple(x.stride())}; pass "
            f"{name}.contiguous()"
        )


def no_gradient(op: str, **named: Tensor | None) -> None:
    """For arguments through which the op has no gradient: asked for one, it must not be lost in silence."""
    if torch.is_grad_enabled():
        for name, x in named.items():
            if x is not None and x.requires_grad:
                raise ValueError(f"{op}: no gradient flows through {name}, but it requires one; pass {name}.detach()")


def number(op: str, name: str, x: float, low: float, high: float, *, open_low: bool = False) -> None:
    """`low <= x <= high` (`low < x` if open_low), and finite; NaN never passes."""
    if not (x > low if open_low else x >= low) or not x <= high or x == math.inf:
        wanted = (
            f"finite and {'>' if open_low else '>='} {low:g}"
            if math.isinf(high)
            else f"in {'(' if open_low else '['}{low:g}, {high:g}]"
        )
        raise ValueError(f"{op}: {name} must be {wanted}, got {x}")


def stored(op: str, *given: object) -> None:
    """That no tensor's storage was freed: torch's own operations crash on one, and an address of zero would pass for an
    argument that was left out. Inside the computation only (while tracing there are no storages)."""
    for x in given:
        if isinstance(x, Tensor) and not x.data_ptr() and x.numel():
            raise ValueError(
                f"{op}: a tensor of shape {tuple(x.shape)} has no storage; it was freed, by FSDP or resize_(0)"
            )


def fractions(op: str, name: str, x: Tensor) -> None:
    """Values of a tensor in [0, 1]; read on a CPU only, and inside the computation (while tracing there are none)."""
    stored(op, x)
    if x.device.type == "cpu" and not bool(((x >= 0.0) & (x <= 1.0)).all()):
        at = int((~((x >= 0.0) & (x <= 1.0))).nonzero()[0])
        raise ValueError(f"{op}: {name} must be in [0, 1], got {float(x[at])} at {at}; clamp it")


def one_of(op: str, name: str, x: str, allowed: Sequence[str]) -> None:
    if x not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {x!r}")


def cu_seqlens(op: str, x: Tensor) -> int:
    """Type, rank and size of cu_seqlens; returns the number of sequences. Its values are checked by the kernel (on a
    CPU)."""
    dtype(op, "cu_seqlens", x, torch.int32)
    if x.ndim != 1 or x.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens must have shape (S+1,), got {tuple(x.shape)}; it is [0, end of sequence 1, ..., N]"
        )
    contiguous(op, cu_seqlens=x)
    return x.shape[0] - 1


def cu_seqlens_values(op: str, x: Tensor, tokens: int) -> None:
    """What a CPU kernel found wrong with cu_seqlens, in words: called only after it refused, or by the reference on a
    CPU."""
    ends = x.tolist()
    if ends[0] != 0 or ends[-1] != tokens:
        raise ValueError(
            f"{op}: cu_seqlens must run from 0 to N = {tokens}, got {ends[0]} to {ends[-1]}; it is the cumulative sum "
            "of the lengths"
        )
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        if b <= a:
            raise ValueError(
                f"{op}: cu_seqlens must increase strictly, got {a} then {b} at sequence {i}; drop sequences without "
                "tokens (their score would be lost)"
            )


def labels_values(op: str, labels: Tensor, vocab: int, ignore_index: int) -> None:
    """What a CPU kernel found wrong with labels, in words: called only after it refused, or by the reference on a
    CPU."""
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: labels must lie in [0, V) = [0, {vocab}) or be ignore_index = {ignore_index}, got "
            f"{int(labels[tuple(at)])} at {at}; "
            "mark tokens to skip with ignore_index"
        )


def _dt(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
