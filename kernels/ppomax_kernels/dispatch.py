"""Which back-end runs a call. A leaf: each op hands in its own table, nothing is decided at import, no environment
variable changes a result."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad

Table = Mapping[str, Callable[..., Any]]

AUTO = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
CUDA_FIRST = frozenset({"token_logprobs"})
"""Ops whose CUDA kernels `auto` takes where they were built, since they were the faster ones on an H200 (2026-11-27,
bench/LOG.md): logits of 8192 x 151936 in bfloat16, forward 620 us against Triton's 1048. The linear ops, whose rows
these kernels serve too, gain nothing that is above the noise of their GEMMs."""
RUNS_ON = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def pick(op: str, impl: str, device: torch.device, table: Table) -> str:
    """The name in `table` that runs on `device`: `impl` itself, or the best one if `impl` is "auto". Never "ref"
    unasked. RuntimeError under a transform that kernels cannot follow."""
    if impl != "ref" and transformed():
        raise RuntimeError(
            f"{op}: kernels have reverse-mode gradients alone, not under forward-mode derivatives or a transform of "
            "torch.func (vmap, jvp, grad, hessian ...); pass impl='ref' there, which is made of torch's own ops"
        )
    kind = device.type
    if impl == "auto":
        if kind == "cuda" and op in CUDA_FIRST and cuda_built():
            return "cuda"
        for name in AUTO.get(kind, ()):
            if name in table:
                return name
        raise ValueError(
            f"{op}: no back-end for device {device}; move the tensors to a CPU or CUDA device, or pass impl='ref'"
        )
    if impl not in table:
        raise ValueError(f"{op}: impl must be 'auto' or one of {sorted(table)}, got {impl!r}")
    if impl == "ref" or RUNS_ON[impl] == kind or (impl == "triton" and kind == "cpu" and triton_interprets()):
        return impl
    raise ValueError(
        f"{op}: impl={impl!r} runs on {RUNS_ON[impl].upper()} tensors, got tensors on {device}; move them, or pass "
        "impl='auto'" + (" (under TRITON_INTERPRET=1 Triton kernels run on a CPU, slowly)" if impl == "triton" else "")
    )


def transformed() -> bool:
    """Whether a transform of torch.func is at work, or a level of forward-mode derivatives is open: a kernel would see
    the plain values behind their tensors, and give derivatives of zero in silence."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def triton_interprets() -> bool:
    """True if Triton is installed and was told to run kernels in its interpreter."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


@cache
def _cuda_built() -> bool:
    from .backends import abi, native_cuda

    return torch.version.hip is None and abi.found() is not None and native_cuda.why_not() is None


def cuda_built() -> bool:
    """True if there is a compiled library with CUDA kernels, and torch is made for CUDA."""
    return _cuda_built()


# What torch.compiler.assume_constant_result sets; that function itself loads Dynamo and Triton at import.
cuda_built._dynamo_marked_constant = True  # type: ignore[attr-defined]


def late(module: str, function: str) -> Callable[..., Any]:
    """A back-end whose module is imported at its first call: importing Triton takes longer than importing torch ops."""
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            from importlib import import_module

            found.append(getattr(import_module(f"{__package__}.{module}"), function))
        return found[0](*args)

    call.__name__ = function
    return call
