"""The C ABI (csrc/ppomax_kernels.h) as ctypes sees it: the one table of its functions, the library that holds them, and
what its statuses mean. Back-ends that call it: native.py and native_internal.py on CPUs, native_cuda.py on GPUs."""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of ppomax_dtype."""
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}
"""Of ppomax_estimator."""
BAD_LABEL, BAD_SEQLENS, BAD_LOGITS, CUDA_ERROR, BAD_PAGE = 5, 6, 7, 10, 11
"""Of ppomax_status: those that a caller of ours tells apart."""
LIBRARY = "libppomax_kernels.dylib" if sys.platform == "darwin" else "libppomax_kernels.so"

P, I, L, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double  # noqa: E741
ARRAY = [P, I]
"""Data and dtype."""
ROWS = [P, I, L, L, L, L, L, P, L, L]
"""Logits with outer, inner, V and strides, then labels with strides."""
BOTH = {
    "token_logprobs": [*ROWS, D, D, L, P, P, P],
    "token_logprobs_backward": [P, L, L, P, L, L, *ROWS, P, P, D, D, L, P],
    "gae": [*ARRAY, L, *ARRAY, L, P, L, P, L, L, D, D, *ARRAY, *ARRAY, P, P],
}
"""Functions for CPUs and CUDA alike, without the last argument: `threads` there, a stream here."""
CPU = {
    **BOTH,
    "kl_penalty": [*ARRAY, *ARRAY, L, I, P],
    "kl_penalty_backward": [P, *ARRAY, *ARRAY, L, I, P],
    "token_rewards": [*ARRAY, *ARRAY, *ARRAY, P, L, L, D, I, P],
    "moments": [*ARRAY, P, L, P],
    "whiten": [*ARRAY, P, L, P, I, D, P],
    "ppo_loss": [*ARRAY, *ARRAY, *ARRAY, P, *ARRAY, *ARRAY, *ARRAY, L, P, D, D, D, D, D, I, D, P, P, P, P],
    "value_loss": [*ARRAY, *ARRAY, *ARRAY, P, L, P, D, D, P, P, P, P],
    "sample": [*ARRAY, L, L, L, P, P, D, L, D, P, P, P, P],
    "packed_linear": [*ARRAY, L, L, L, L, P, P, L, I, P],
    "pack_linear": [*ARRAY, L, L, L, L, P],
    "rms_norm": [*ARRAY, L, L, *ARRAY, D, D, P],
    "rms_norm_backward": [P, L, L, P, D, D, P, P, P],
    "silu_mul": [*ARRAY, L, L, P],
    "silu_mul_backward": [P, L, L, P, P],
    "rotate": [P, L, L, L, L, L, L, L, P, P, L, I, P],
    "packed_attention": [*[P, L, L] * 3, *[L] * 5, P, L, D, L, P],
    "packed_attention_backward": [*[P, L, L] * 3, P, *[L] * 5, P, L, D, L, P, P, P],
    "decode_block": [P, P, I, L, P, P, P, P, L, P, L, L, P, P, D, L, D, P, P],
    "paged_attention": [*[P, L, L] * 3, I, *[L] * 5, P, P, L, P, L, L, P, P, D, L, D, P],
}
SIGNATURES = {f"ppomax_{name}_cpu": [*types, I] for name, types in CPU.items()} | {
    f"ppomax_{name}_cuda": [*types, P] for name, types in BOTH.items()
}
"""Every op's function by its name in the header: the types of its arguments; it returns a status."""


def _folders() -> list[Path]:
    return [Path(folder) for folder in sys.modules["ppomax_kernels"].__path__]


def found() -> Path | None:
    """The compiled library, beside the package's modules or where an editable install put it; None: not there."""
    return next((path for folder in _folders() if (path := folder / LIBRARY).is_file()), None)


def library_path() -> Path:
    """Where the compiled library is: beside the package's modules, or where an editable install put it. RuntimeError,
    naming where it was looked for and how to build it, if it is not there."""
    path = found()
    if path is None:
        places = [folder / LIBRARY for folder in _folders()]
        raise RuntimeError(
            f"ppomax_kernels: impl='cpu' needs the compiled library, which is not at {' or '.join(map(str, places))}; "
            "build it with `pip install .` (or `pip install -e .`) in the repository's root, which takes CMake and a "
            "C++ compiler; impl='ref' runs without"
        )
    return path


@cache
def library() -> ctypes.CDLL:
    """The compiled library, loaded at the first call of an op."""
    lib = ctypes.CDLL(str(library_path()))
    lib.ppomax_status_string.restype = lib.ppomax_isa_name.restype = ctypes.c_char_p
    lib.ppomax_decode_block_scratch.argtypes, lib.ppomax_decode_block_scratch.restype = [P, L], L
    lib.ppomax_cuda_note.restype = ctypes.c_char_p
    built = lib.ppomax_cuda_built()
    if built:  # else the library has none of CUDA's functions
        lib.ppomax_cuda_error.restype = ctypes.c_char_p
    for name, types in SIGNATURES.items():
        if not name.endswith("_cuda") or built:
            function = getattr(lib, name)
            function.argtypes, function.restype = types, I
    return lib


def refuse(op: str, status: int) -> None:
    reason = library().ppomax_status_string(status).decode()
    raise RuntimeError(f"{op}: the compiled library refused the call: {reason} (status {status})")
