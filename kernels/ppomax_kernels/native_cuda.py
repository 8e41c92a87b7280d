"""The ctypes face of the C ABI's CUDA kernels (csrc/cuda). Work is queued on the current stream of the tensors' device;
nothing is read back. They are in the library if it was built with a CUDA compiler; where not, a call says why."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from . import checks, native
from .native import _array, _at, _upstream

CUDA_ERROR = 10  # ppomax_status
P, I, L, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double  # noqa: E741

# As in native.py: data and dtype; logits with outer, inner, V, strides, and labels with strides. The stream comes last.
ARRAY, ROWS = [P, I], [P, I, L, L, L, L, L, P, L, L]
SIGNATURES = {
    "ppomax_token_logprobs_cuda": [*ROWS, D, D, L, P, P, P, P],
    "ppomax_token_logprobs_backward_cuda": [P, L, L, P, L, L, *ROWS, P, P, D, D, L, P, P],
    "ppomax_gae_cuda": [*ARRAY, L, *ARRAY, L, P, L, P, L, L, D, D, *ARRAY, *ARRAY, P, P, P],
}


def why_not() -> str | None:
    """Why there are no CUDA kernels in the compiled library; None if there are."""
    lib = native.library()
    lib.ppomax_cuda_note.restype = ctypes.c_char_p
    if lib.ppomax_cuda_built():
        return None
    return f"no CUDA kernels in the compiled library: {lib.ppomax_cuda_note().decode()}"


@cache
def library() -> ctypes.CDLL:
    if (reason := why_not()) is not None:
        raise RuntimeError(f"impl='cuda': {reason}. impl='triton' runs on the same tensors")
    lib = native.library()
    for name, types in SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = types, I
    lib.ppomax_cuda_error.restype = ctypes.c_char_p
    lib.ppomax_status_string.restype = ctypes.c_char_p
    return lib


def _run(name: str, on: Tensor, *args: object) -> None:
    """Queue the native function on the current stream of the tensors' device, made the current one for the call."""
    lib = library()
    with torch.cuda.device(on.device):
        status = getattr(lib, name)(*args, torch.cuda.current_stream(on.device).cuda_stream)
    if status:
        detail = f" ({lib.ppomax_cuda_error().decode()})" if status == CUDA_ERROR else ""
        what = lib.ppomax_status_string(status).decode()
        raise RuntimeError(f"{name} on tensors of shape {tuple(on.shape)}: {what}{detail}")


def _safe(op: str, like: Tensor, dtype: torch.dtype, shape: torch.Size, **named: Tensor | None) -> None:
    """What memory safety needs, again: the registered ops may be called without the public function."""
    checks.same_device(op, "the first argument", like, **named)
    for name, x in named.items():
        if x is not None:
            checks.dtype(op, name, x, dtype)
    checks.same_shape(op, "the rows", shape, **named)


def _rows(op: str, logits: Tensor, labels: Tensor) -> tuple[int | None, ...]:
    _safe(op, logits, torch.int64, logits.shape[:-1], labels=labels)
    checks.unit_stride(op, "logits", logits)
    outer, inner, outer_stride, inner_stride = checks.rows(op, "logits", logits.shape[:-1], logits.stride()[:-1])
    of_labels = labels.data_ptr(), *checks.rows(op, "labels", labels.shape, labels.stride())[2:]
    return *_array(logits), outer, inner, logits.shape[-1], outer_stride, inner_stride, *of_labels


def token_logprobs_cuda(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, entropy: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    ent = torch.empty(labels.shape if entropy else (0,), dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logprobs)
    rows = _rows("token_logprobs", logits, labels)
    outputs = _at(logprobs), _at(ent) if entropy else None, _at(lse)
    _run("ppomax_token_logprobs_cuda", logits, *rows, temperature, softcap, ignore_index, *outputs)
    return logprobs, ent, lse


def token_logprobs_backward_cuda(
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    out: Tensor | None = None,
) -> Tensor:
    op = "token_logprobs"
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    saved = None if dentropy is None else entropy
    rows = _rows(op, logits, labels)
    _safe(op, logits, torch.float32, labels.shape, dlogprobs=dlogprobs, dentropy=dentropy, lse=lse, entropy=saved)
    _safe(op, logits, logits.dtype, logits.shape, out=dlogits)
    checks.contiguous(op, out=dlogits, lse=lse, entropy=saved)
    dlp, *dlp_strides = _upstream(op, "dlogprobs", dlogprobs)
    dent, *dent_strides = _upstream(op, "dentropy", dentropy)
    up = _at(dlp), *dlp_strides, _at(dent), *dent_strides
    rest = _at(lse), _at(saved), temperature, softcap, ignore_index, _at(dlogits)
    _run("ppomax_token_logprobs_backward_cuda", logits, *up, *rows, *rest)
    return dlogits


def gae_cuda(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    lams: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else rewards.shape[0]
    for_sequences = dict(lam=lams, bootstrap=bootstrap)
    checks.same_device("gae", "rewards", rewards, values=values, cu_seqlens=cu_seqlens, mask=mask, **for_sequences)
    checks.same_shape("gae", "rewards", rewards.shape, values=values, mask=mask)
    checks.same_shape("gae", "cu_seqlens", (sequences,), **for_sequences)

    def row_stride(x: Tensor | None) -> int:
        return 0 if packed or x is None else x.stride(0)

    tokens = *_array(rewards), row_stride(rewards), *_array(values), row_stride(values), _at(mask), row_stride(mask)
    sizes = _at(cu_seqlens), sequences, rewards.shape[-1], gamma, lam
    _run("ppomax_gae_cuda", rewards, *tokens, *sizes, *_array(lams), *_array(bootstrap), _at(advantages), _at(returns))
    return advantages, returns
