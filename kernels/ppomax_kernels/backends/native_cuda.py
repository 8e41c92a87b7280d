"""The ctypes face of the C ABI's CUDA kernels (csrc/cuda). Work is queued on the current stream of the tensors' device;
nothing is read back. They are in the library if it was built with a CUDA compiler; where not, a call says why."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from .. import checks
from . import abi
from .abi import CUDA_ERROR
from .native_arguments import array, at, upstream


def why_not() -> str | None:
    """Why there are no CUDA kernels in the compiled library; None if there are."""
    lib = abi.library()
    if lib.ppomax_cuda_built():
        return None
    return f"no CUDA kernels in the compiled library: {lib.ppomax_cuda_note().decode()}"


@cache
def library() -> ctypes.CDLL:
    """The compiled library, if CUDA kernels are in it. RuntimeError says why they are not."""
    if (reason := why_not()) is not None:
        raise RuntimeError(f"impl='cuda': {reason}. impl='triton' runs on the same tensors")
    return abi.library()


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
    return *array(logits), outer, inner, logits.shape[-1], outer_stride, inner_stride, *of_labels


def token_logprobs_cuda(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, entropy: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    ent = torch.empty(labels.shape if entropy else (0,), dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logprobs)
    rows = _rows("token_logprobs", logits, labels)
    outputs = at(logprobs), at(ent) if entropy else None, at(lse)
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
    dlp, *dlp_strides = upstream(op, "dlogprobs", dlogprobs)
    dent, *dent_strides = upstream(op, "dentropy", dentropy)
    up = at(dlp), *dlp_strides, at(dent), *dent_strides
    rest = at(lse), at(saved), temperature, softcap, ignore_index, at(dlogits)
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

    tokens = *array(rewards), row_stride(rewards), *array(values), row_stride(values), at(mask), row_stride(mask)
    sizes = at(cu_seqlens), sequences, rewards.shape[-1], gamma, lam
    _run("ppomax_gae_cuda", rewards, *tokens, *sizes, *array(lams), *array(bootstrap), at(advantages), at(returns))
    return advantages, returns
