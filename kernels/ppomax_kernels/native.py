"""The ctypes face of the C ABI on CPUs (csrc/ppomax_kernels.h): each function allocates its results, hands over
pointers, and turns a status into an error. A call costs some 5 us, so functions are bound once and nothing is computed
that the C side can compute. Tensors come checked by the public functions; the C side repeats the checks that memory
safety needs."""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, contiguous_format, empty, empty_like, float32, get_num_threads

from . import checks

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}
BAD_LABEL, BAD_SEQLENS, BAD_LOGITS, BAD_PAGE = 5, 6, 7, 11  # ppomax_status
LIBRARY = "libppomax_kernels.dylib" if sys.platform == "darwin" else "libppomax_kernels.so"

P, I, L, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double  # noqa: E741
ARRAY, LOGITS, LABELS = (
    [P, I],
    [P, I, L, L, L, L, L],
    [P, L, L],
)  # data and dtype; and outer, inner, V, strides; and strides
SIGNATURES = {
    "token_logprobs": [*LOGITS, *LABELS, D, D, L, P, P, P, I],
    "token_logprobs_backward": [P, L, L, P, L, L, *LOGITS, *LABELS, P, P, D, D, L, P, I],
    "kl_penalty": [*ARRAY, *ARRAY, L, I, P, I],
    "kl_penalty_backward": [P, *ARRAY, *ARRAY, L, I, P, I],
    "token_rewards": [*ARRAY, *ARRAY, *ARRAY, P, L, L, D, I, P, I],
    "gae": [*ARRAY, L, *ARRAY, L, P, L, P, L, L, D, D, *ARRAY, *ARRAY, P, P, I],
    "moments": [*ARRAY, P, L, P, I],
    "whiten": [*ARRAY, P, L, P, I, D, P, I],
    "ppo_loss": [*ARRAY, *ARRAY, *ARRAY, P, *ARRAY, *ARRAY, *ARRAY, L, P, D, D, D, D, D, I, D, P, P, P, P, I],
    "value_loss": [*ARRAY, *ARRAY, *ARRAY, P, L, P, D, D, P, P, P, P, I],
    "sample": [*ARRAY, L, L, L, P, P, D, L, D, P, P, P, P, I],
    "packed_linear": [*ARRAY, L, L, P, P, L, P, I],
    "pack_linear": [*ARRAY, L, L, P, I],
    "rms_norm": [*ARRAY, L, L, *ARRAY, D, D, P, I],
    "silu_mul": [*ARRAY, L, L, P, I],
    "paged_attention": [*[P, L, L] * 3, I, *[L] * 5, P, P, L, P, L, L, P, P, D, L, D, P, I],
}


def library_path() -> Path:
    """Where the compiled library is: beside the package's modules, or where an editable install put it. RuntimeError,
    naming where it was looked for and how to build it, if it is not there."""
    places = [Path(folder) / LIBRARY for folder in sys.modules[__package__].__path__]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise RuntimeError(
            f"ppomax_kernels: impl='cpu' needs the compiled library, which is not at {' or '.join(map(str, places))}; "
            "build it with `pip install .` (or `pip install -e .`) in the repository's root, which takes CMake and a "
            "C++ compiler; impl='ref' runs without"
        )
    return found


@cache
def library() -> ctypes.CDLL:
    """The compiled library, loaded at the first call of an op."""
    lib = ctypes.CDLL(str(library_path()))
    for name, types in SIGNATURES.items():
        function = getattr(lib, f"ppomax_{name}_cpu")
        function.argtypes, function.restype = types, I
    lib.ppomax_status_string.restype = lib.ppomax_isa_name.restype = ctypes.c_char_p
    return lib


def _refuse(op: str, status: int) -> None:
    reason = library().ppomax_status_string(status).decode()
    raise RuntimeError(f"{op}: the compiled library refused the call: {reason} (status {status})")


def _new(like: Tensor) -> Tensor:
    """An fp32 result of the shape of `like`: half the cost of torch.empty(like.shape), which parses the shape."""
    return empty_like(like, dtype=float32, memory_format=contiguous_format)


def _array(x: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), DTYPES[x.dtype])


def _match(op: str, like: Tensor, *others: Tensor | None) -> None:
    """What memory safety needs, for callers of the raw torch ops: arrays of one size, in order, on the CPU."""
    for x in (like, *others):
        if x is not None and (x.shape != like.shape or not x.is_contiguous() or not x.is_cpu):
            raise ValueError(
                f"{op}: tensors must be contiguous, on the CPU and of one shape {tuple(like.shape)}, got one of shape "
                f"{tuple(x.shape)}, strides {tuple(x.stride())}, on {x.device}"
            )


def _match_rows(op: str, logits: Tensor, labels: Tensor) -> None:
    if labels.shape != logits.shape[:-1] or labels.dtype != torch.int64 or not (logits.is_cpu and labels.is_cpu):
        raise ValueError(
            f"{op}: labels must be int64 of shape {tuple(logits.shape[:-1])} on the CPU, got {labels.dtype} of shape "
            f"{tuple(labels.shape)} on {labels.device}"
        )
    if logits.stride()[-1] != 1 and logits.shape[-1] > 1:
        raise ValueError(f"{op}: the last dimension of logits must be contiguous, got strides {logits.stride()}")


def _match_sequences(op: str, cu_seqlens: Tensor, *each: Tensor | None) -> None:
    if (
        cu_seqlens.dtype != torch.int32
        or cu_seqlens.ndim != 1
        or not cu_seqlens.is_contiguous()
        or not cu_seqlens.is_cpu
    ):
        raise ValueError(f"{op}: cu_seqlens must be int32 of shape (S+1,), contiguous, on the CPU")
    if any(x is not None and x.numel() != cu_seqlens.numel() - 1 for x in each):
        raise ValueError(f"{op}: there must be one number for each of the {cu_seqlens.numel() - 1} sequences")


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _upstream(op: str, name: str, x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A gradient of one number a row, and its two strides. One that two strides cannot walk is copied: it is small
    beside the logits."""
    if x is None:
        return None, 0, 0
    try:
        return x, *checks.rows(op, name, x.shape, x.stride())[2:]
    except ValueError:
        x = x.contiguous()
        return x, *checks.rows(op, name, x.shape, x.stride())[2:]


def token_logprobs_cpu(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, entropy: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    _match_rows("token_logprobs", logits, labels)
    shape, strides, vocab = labels.shape, logits.stride(), logits.shape[-1]
    outer, inner, outer_stride, inner_stride = checks.rows("token_logprobs", "logits", shape, strides[:-1])
    _, _, labels_outer, labels_inner = checks.rows("token_logprobs", "labels", shape, labels.stride())
    logprobs, lse = _new(labels), _new(labels)
    ent = _new(labels) if entropy else empty(0, dtype=float32)
    status = library().ppomax_token_logprobs_cpu(
        logits.data_ptr(), DTYPES[logits.dtype], outer, inner, vocab, outer_stride, inner_stride,
        labels.data_ptr(), labels_outer, labels_inner, temperature, softcap, ignore_index,
        logprobs.data_ptr(), ent.data_ptr() if entropy else None, lse.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_LABEL:
            checks.labels_values("token_logprobs", labels, vocab, ignore_index)
        _refuse("token_logprobs", status)
    return logprobs, ent, lse


def token_logprobs_backward_cpu(
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
    op, shape, vocab = "token_logprobs", labels.shape, logits.shape[-1]
    _match_rows(op, logits, labels)
    _match(op, lse, entropy if dentropy is not None else None)
    if lse.shape != shape or any(x is not None and x.shape != shape for x in (dlogprobs, dentropy)):
        raise ValueError(f"{op}: lse and gradients must have the shape {tuple(shape)} of labels")
    if out is not None:
        if out.dtype != logits.dtype:
            raise ValueError(f"{op}: out must be {logits.dtype} like logits, got {out.dtype}")
        _match(op, out, None if out.shape == logits.shape else logits)
    outer, inner, outer_stride, inner_stride = checks.rows(op, "logits", shape, logits.stride()[:-1])
    _, _, labels_outer, labels_inner = checks.rows(op, "labels", shape, labels.stride())
    dlogprobs, dl_outer, dl_inner = _upstream(op, "dlogprobs", dlogprobs)
    dentropy, dh_outer, dh_inner = _upstream(op, "dentropy", dentropy)
    dlogits = empty_like(logits, memory_format=contiguous_format) if out is None else out
    status = library().ppomax_token_logprobs_backward_cpu(
        _at(dlogprobs), dl_outer, dl_inner, _at(dentropy), dh_outer, dh_inner, logits.data_ptr(),
        DTYPES[logits.dtype], outer, inner, vocab, outer_stride, inner_stride, labels.data_ptr(), labels_outer,
        labels_inner, lse.data_ptr(), entropy.data_ptr() if dentropy is not None else None, temperature, softcap,
        ignore_index, dlogits.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_LABEL:
            checks.labels_values(op, labels, vocab, ignore_index)
        _refuse(op, status)
    return dlogits


def kl_penalty_cpu(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    _match("kl_penalty", logprobs, ref_logprobs)
    kl = _new(logprobs)
    status = library().ppomax_kl_penalty_cpu(
        logprobs.data_ptr(), DTYPES[logprobs.dtype], ref_logprobs.data_ptr(), DTYPES[ref_logprobs.dtype],
        kl.numel(), ESTIMATORS[estimator], kl.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse("kl_penalty", status)
    return kl


def kl_penalty_backward_cpu(dkl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    _match("kl_penalty", logprobs, ref_logprobs, dkl)
    dlogprobs = _new(logprobs)
    status = library().ppomax_kl_penalty_backward_cpu(
        dkl.data_ptr(), logprobs.data_ptr(), DTYPES[logprobs.dtype], ref_logprobs.data_ptr(),
        DTYPES[ref_logprobs.dtype], dlogprobs.numel(), ESTIMATORS[estimator], dlogprobs.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse("kl_penalty", status)
    return dlogprobs


def token_rewards_cpu(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, kl_coef: float, estimator: str
) -> Tensor:
    _match("token_rewards", logprobs, ref_logprobs)
    _match_sequences("token_rewards", cu_seqlens, scores)
    tokens = logprobs.shape[0]
    rewards = _new(logprobs)
    status = library().ppomax_token_rewards_cpu(
        scores.data_ptr(), DTYPES[scores.dtype], logprobs.data_ptr(), DTYPES[logprobs.dtype], ref_logprobs.data_ptr(),
        DTYPES[ref_logprobs.dtype], cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, tokens, kl_coef,
        ESTIMATORS[estimator], rewards.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_SEQLENS:
            checks.cu_seqlens_values("token_rewards", cu_seqlens, tokens)
        _refuse("token_rewards", status)
    return rewards


def gae_cpu(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    lams: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape, row, value_row = rewards.shape, rewards.stride(), values.stride()
    mask_row = row if mask is None else mask.stride()
    strided = (row[-1] != 1 or value_row[-1] != 1 or mask_row[-1] != 1) and shape[-1] > 1
    if values.shape != shape or (mask is not None and mask.shape != shape) or strided or not rewards.is_cpu:
        raise ValueError(f"gae: tensors must have one shape {tuple(shape)}, the last dimension contiguous, on the CPU")
    tokens, padded = shape[-1], cu_seqlens is None
    if cu_seqlens is None:
        sequences = shape[0]
        if (lams is not None and lams.numel() != sequences) or (
            bootstrap is not None and bootstrap.numel() != sequences
        ):
            raise ValueError(f"gae: lam and bootstrap must have one number for each of the {sequences} sequences")
    else:
        _match_sequences("gae", cu_seqlens, lams, bootstrap)
        sequences = cu_seqlens.shape[0] - 1
    advantages, returns = _new(rewards), _new(rewards)
    status = library().ppomax_gae_cpu(
        rewards.data_ptr(), DTYPES[rewards.dtype], row[0] if padded else 0,
        values.data_ptr(), DTYPES[values.dtype], value_row[0] if padded else 0,
        _at(mask), mask_row[0] if padded else 0,
        _at(cu_seqlens), sequences, tokens, gamma, lam, *_array(lams), *_array(bootstrap),
        advantages.data_ptr(), returns.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_SEQLENS and cu_seqlens is not None:
            checks.cu_seqlens_values("gae", cu_seqlens, tokens)
        _refuse("gae", status)
    return advantages, returns


def moments_cpu(x: Tensor, mask: Tensor | None) -> Tensor:
    _match("whiten", x, mask)
    moments = empty(3, dtype=torch.float64)
    status = library().ppomax_moments_cpu(*_array(x), _at(mask), x.numel(), moments.data_ptr(), get_num_threads())
    if status:
        _refuse("whiten", status)
    return moments


def whiten_cpu(x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, eps: float) -> Tensor:
    _match("whiten", x, mask)
    y = _new(x)
    status = library().ppomax_whiten_cpu(
        *_array(x), _at(mask), y.numel(), moments.data_ptr(), shift_mean, eps, y.data_ptr(), get_num_threads()
    )
    if status:
        _refuse("whiten", status)
    return y


def ppo_loss_cpu(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    is_weights: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    norm_value: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    estimator: str,
    ent_coef: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _match("ppo_loss", logprobs, old_logprobs, advantages, mask, is_weights, ref_logprobs, entropy)
    loss, scale, metrics = empty((), dtype=float32), empty((), dtype=float32), empty(9, dtype=float32)
    dlogprobs = _new(logprobs) if need_grad else empty(0, dtype=float32)
    status = library().ppomax_ppo_loss_cpu(
        *_array(logprobs), *_array(old_logprobs), *_array(advantages), _at(mask), *_array(is_weights),
        *_array(ref_logprobs), *_array(entropy), logprobs.numel(), _at(normalizer), norm_value, clip_low, clip_high,
        dual_clip, kl_coef, ESTIMATORS[estimator], ent_coef, loss.data_ptr(), metrics.data_ptr(),
        dlogprobs.data_ptr() if need_grad else None, scale.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse("ppo_loss", status)
    return loss, metrics, dlogprobs, scale


def value_loss_cpu(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    norm_value: float,
    clip: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _match("value_loss", values, old_values, returns, mask)
    loss, scale, metrics = empty((), dtype=float32), empty((), dtype=float32), empty(6, dtype=float32)
    dvalues = _new(values) if need_grad else empty(0, dtype=float32)
    status = library().ppomax_value_loss_cpu(
        *_array(values), *_array(old_values), *_array(returns), _at(mask), values.numel(), _at(normalizer),
        norm_value, clip, loss.data_ptr(), metrics.data_ptr(), dvalues.data_ptr() if need_grad else None,
        scale.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse("value_loss", status)
    return loss, metrics, dvalues, scale


def sample_cpu(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    _match_rows("sample", logits, seeds)
    _match("sample", seeds, positions)
    token = empty(rows, dtype=torch.int64)
    logprob, plain_logprob, entropy = empty(rows, dtype=float32), empty(rows, dtype=float32), empty(rows, dtype=float32)
    status = library().ppomax_sample_cpu(
        *_array(logits), rows, vocab, logits.stride()[0], seeds.data_ptr(), positions.data_ptr(), temperature, top_k,
        top_p, token.data_ptr(), logprob.data_ptr(), plain_logprob.data_ptr(), entropy.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_LOGITS:
            row = int((token < 0).nonzero()[0])
            raise ValueError(
                f"sample: row {row} of logits holds NaN or +inf, or nothing above -inf; no token can be drawn from it"
            )
        _refuse("sample", status)
    return token, logprob, plain_logprob, entropy


def paged_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    op = "paged_attention"
    tokens, heads, dim = query.shape
    _, kv_heads, value_dim = value.shape
    q, k, v = query.stride(), key.stride(), value.stride()
    if ((q[2] != 1 or k[2] != 1) and dim > 1) or (v[2] != 1 and value_dim > 1):
        raise ValueError(f"{op}: the last dimension of query, key and value must be contiguous, got {q}, {k}, {v}")
    if not (key_pages.is_contiguous() and value_pages.is_contiguous() and key.is_cpu and key_pages.is_cpu):
        raise ValueError(f"{op}: pages must be contiguous and on the CPU; make them by empty_pages")
    out = empty(tokens, heads, value_dim, dtype=query.dtype)
    status = library().ppomax_paged_attention_cpu(
        query.data_ptr(), q[0], q[1], key.data_ptr(), k[0], k[1], value.data_ptr(), v[0], v[1], DTYPES[query.dtype],
        tokens, heads, kv_heads, dim, value_dim, key_pages.data_ptr(), value_pages.data_ptr(), key_pages.shape[0],
        tables.data_ptr(), *tables.shape, sequences.data_ptr(), positions.data_ptr(), scale, window, softcap,
        out.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_PAGE:
            raise ValueError(
                f"{op}: a token's sequence, position or page lies outside {tuple(tables.shape)} tables of "
                f"{key_pages.shape[0]} pages; check tables, sequences and positions"
            )
        _refuse(op, status)
    return out


def packed_linear_cpu(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    inputs = x.shape[-1]
    y = empty(*x.shape[:-1], outputs, dtype=x.dtype)
    status = library().ppomax_packed_linear_cpu(
        x.data_ptr(), DTYPES[x.dtype], x.numel() // inputs, inputs, panels.data_ptr(), _at(bias), outputs,
        y.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse("packed_linear", status)
    return y


def pack_linear_cpu(weight: Tensor, panels: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    status = library().ppomax_pack_linear_cpu(
        weight.data_ptr(), DTYPES[weight.dtype], outputs, inputs, panels.data_ptr(), get_num_threads()
    )
    if status:
        _refuse("pack_linear", status)
    return panels


def rms_norm_cpu(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    width, y = len(weight), empty_like(x)
    status = library().ppomax_rms_norm_cpu(
        x.data_ptr(), DTYPES[x.dtype], x.numel() // width, width, weight.data_ptr(), DTYPES[weight.dtype], offset, eps,
        y.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        _refuse("rms_norm", status)
    return y


def silu_mul_cpu(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    y = empty(*x.shape[:-1], width, dtype=x.dtype)
    status = library().ppomax_silu_mul_cpu(
        x.data_ptr(), DTYPES[x.dtype], x.numel() // (2 * width), width, y.data_ptr(), get_num_threads()
    )
    if status:
        _refuse("silu_mul", status)
    return y
