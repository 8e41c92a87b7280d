"""How every Triton launcher starts its kernel: on the device of its tensors, in that device's current stream, whatever
device is current (Triton itself takes the current one, and autograd's thread may have another). While kernels are
compiled ahead of time, the same launchers run on meta tensors and each launch is handed to a recorder instead: so what
is compiled is what is launched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Recorder = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
Case = tuple[str, Callable[[], object]]
"""A launch of real use, for ahead-of-time compilation: its name, and a call of the launcher on meta tensors."""

_RECORDER: ContextVar[tuple[Recorder, str] | None] = ContextVar("ppomax_triton_recorder", default=None)


def launch(kernel: Any, programs: tuple[int, ...], first: Tensor, *args: Any, **constants: Any) -> None:
    """Start `programs` programs of `kernel`; `first` is its first argument and names the device.

    A product and a sum are fused into one rounding whatever Triton's default: no environment variable changes a bit.
    """
    constants["enable_fp_fusion"] = True
    recording = _RECORDER.get()
    if recording is not None:
        recording[0](kernel, (first, *args), constants)
    elif first.is_cuda:
        with torch.cuda.device_of(first):
            kernel[programs](first, *args, **constants)
    else:
        import numpy  # the interpreter computes with it, and would warn of every -inf that a GPU takes in its stride

        with numpy.errstate(all="ignore"):
            kernel[programs](first, *args, **constants)


def backend() -> str:
    """Whose GPUs launches are for: "cuda" or "hip"."""
    recording = _RECORDER.get()
    if recording is not None:
        return recording[1]
    return "cuda" if torch.version.hip is None else "hip"


@contextmanager
def recorded(recorder: Recorder, backend: str) -> Iterator[None]:
    """Within this block nothing is launched: `recorder(kernel, args, constants)` is called, as for "cuda" or "hip"."""
    token = _RECORDER.set((recorder, backend))
    try:
        yield
    finally:
        _RECORDER.reset(token)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A meta tensor for a Case."""
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """The same, of whole numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask as kernels read it: uint8, no copy."""
    return None if mask is None else mask.view(torch.uint8)
