# mypy: allow-untyped-defs
"""Log-probability of each label and entropy of each row, from logits; one program a row, tokens on grid-x.

x is the logit after the softcap, z = x/temperature, m = max x, d = x - m, e = exp(d/temperature):
logprob = (x[y] - m)/temperature - log(sum e) ;  lse = m/temperature + log(sum e) ;
H = log(sum e) - (sum e*d)/(sum e)/temperature ;
dx = (g*(1[y] - p) - h*p*(z - (lse - H))) / temperature * (softcap: 1 - tanh^2), with p*z = 0 where p = 0.

Forward, one read of the row (2 B a logit in bf16, 12 B a row out): maximum, sum and weighted sum are kept while walking
blocks of the row, all relative to the running maximum, so a common offset of the logits costs no digits. One exp2 a
logit, the scale log2(e)/temperature folded in. A thread's logits have a maximum and sums of their own until the end: no
barrier in the loop. The next block is loaded before the present one is used, so that 8 KiB a program are under way at
all times; three or more programs a multiprocessor cover what an H100 needs in flight (about 18 KiB: 3 TB/s times 0.8
us).
Backward, one read and one write of the row, from the saved lse and entropy. lse is a single float: where it is large
its rounding alone would show in p, so such a row (|lse| > REDO: seldom in bf16, often in fp32) reads its logits once
more, for m and log(sum e) apart. `out` may be the logits themselves: each block is read before it is written.
Left out on purpose: autotuning, and splitting a row over programs; both would make a row's bits depend on the other
rows."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .backends.launch_triton import Case, floats, integers, launch
from .backends.math_triton import LOG2E, narrow, tanh
from .vocab_shard import FOREIGN as FOREIGN_LABEL

FOREIGN = tl.constexpr(FOREIGN_LABEL)  # a label in another rank's shard: the row counts, without a label here
LEAST = tl.constexpr(-3.4028234663852886e38)  # of finite floats
ROWS = ["inner", "labels_outer", "labels_inner"]


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Element offset of a row whose leading dimensions are two levels; int64, as N*V may pass 2^31."""
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def row_stats(
    row_ptr, end, scale, softcap, BLOCK: tl.constexpr, GROUP: tl.constexpr, APART: tl.constexpr, SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """(m, sum e, sum e*d) of the first `end` logits; scale is log2(e)/temperature. A row of -inf gives (LEAST, 0, 0).

    GROUP logits of one thread, side by side or APART, have a maximum of their own, to which their sums refer until the
    end, so no thread waits for another in the loop."""
    outer: tl.constexpr = BLOCK // GROUP
    if APART:
        lanes = tl.arange(0, outer)[:, None] + tl.arange(0, GROUP)[None, :] * outer
    else:
        lanes = tl.arange(0, outer)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    top = tl.full((outer,), LEAST, tl.float32)
    sums = tl.zeros((outer,), tl.float32)
    weighted = tl.zeros((outer,), tl.float32)
    ahead = tl.load(row_ptr + lanes, mask=lanes < end, other=float("-inf"))
    for start in range(0, end, BLOCK):
        x = ahead.to(tl.float32)
        ahead = tl.load(row_ptr + start + BLOCK + lanes, mask=start + BLOCK + lanes < end, other=float("-inf"))
        if SOFTCAP:  # the tail again: tanh(-inf) is -1, not -inf
            x = tl.where(start + lanes < end, _capped(x, softcap, SOFTCAP), float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        shift = tl.exp2((top - new_top) * scale)
        d = x - new_top[:, None]
        e = tl.exp2(d * scale)
        if ENTROPY:
            here = tl.sum(e * tl.maximum(d, LEAST), 1)  # 0 * inf is NaN
            weighted = _moved(weighted, sums, shift, top - new_top) + here
        sums = sums * shift + tl.sum(e, 1)
        top = new_top
    whole = tl.max(top, 0)
    shift = tl.exp2((top - whole) * scale)
    if ENTROPY:
        weighted = _moved(weighted, sums, shift, top - whole)
    return whole, tl.sum(sums * shift, 0), tl.sum(weighted, 0)


@triton.jit
def _moved(weighted, sums, shift, by):
    """sum e*d when the maximum grows by -by, e shrinks to e * shift. Zeros are taken apart: 0 * inf is NaN, and a mask
    value of -3e38 makes (sum * by) overflow."""
    return tl.where(shift == 0.0, 0.0, shift * (weighted + sums * tl.where(shift == 0.0, 0.0, by)))


@triton.jit(do_not_specialize=[*ROWS, "ignore_index"], do_not_specialize_on_alignment=["labels_ptr"])
def _token_logprobs_kernel(
    logits_ptr, labels_ptr, logprobs_ptr, entropy_ptr, lse_ptr, V, inner, logits_outer, logits_inner, labels_outer,
    labels_inner, temperature, softcap, ignore_index, BLOCK: tl.constexpr, GROUP: tl.constexpr, APART: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_offset(row, inner, logits_outer, logits_inner)
    label = tl.load(labels_ptr + row_offset(row, inner, labels_outer, labels_inner))
    keep = label != ignore_index
    valid = (label >= 0) & (label < V)
    per_nat = 1.0 / temperature
    end = tl.where(keep, V, 0)  # a skipped row reads no logit
    entropic: tl.constexpr = entropy_ptr is not None
    top, total, weighted = row_stats(row_ptr, end, per_nat * LOG2E, softcap, BLOCK, GROUP, APART, SOFTCAP, entropic)
    picked = _capped(tl.load(row_ptr + label, mask=keep & valid, other=0.0).to(tl.float32), softcap, SOFTCAP)
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)  # dead: -inf throughout, or skipped
    log_total = tl.log(total)
    logprob = tl.where(dead, float("-inf"), (picked - tl.where(dead, 0.0, top)) * per_nat - log_total)
    logprob = tl.where(valid, logprob, tl.where(label == FOREIGN, 0.0, float("nan")))
    tl.store(logprobs_ptr + row, tl.where(keep, logprob, 0.0))
    tl.store(lse_ptr + row, tl.where(keep, tl.where(dead, float("-inf"), top * per_nat + log_total), 0.0))
    if entropy_ptr is not None:
        entropy = log_total - weighted / total * per_nat
        tl.store(entropy_ptr + row, tl.where(keep, tl.where(dead, 0.0, entropy), 0.0))


@triton.jit(
    do_not_specialize=[*ROWS, "dlogprobs_outer", "dlogprobs_inner", "dentropy_outer", "dentropy_inner", "ignore_index"],
    do_not_specialize_on_alignment=["labels_ptr", "dlogprobs_ptr", "dentropy_ptr", "lse_ptr", "entropy_ptr"],
)
def _token_logprobs_backward_kernel(
    logits_ptr, out_ptr, labels_ptr, lse_ptr, entropy_ptr, dlogprobs_ptr, dentropy_ptr, V, inner, logits_outer,
    logits_inner, out_outer, out_inner, labels_outer, labels_inner, dlogprobs_outer, dlogprobs_inner, dentropy_outer,
    dentropy_inner, temperature, softcap, ignore_index, BLOCK: tl.constexpr, GROUP: tl.constexpr, APART: tl.constexpr,
    SOFTCAP: tl.constexpr, REDO: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_offset(row, inner, logits_outer, logits_inner)
    out_row = out_ptr + row_offset(row, inner, out_outer, out_inner)
    label = tl.load(labels_ptr + row_offset(row, inner, labels_outer, labels_inner))
    lse = tl.load(lse_ptr + row)
    g = 0.0
    h = 0.0
    entropy = 0.0
    if dlogprobs_ptr is not None:
        g = tl.load(dlogprobs_ptr + row_offset(row, inner, dlogprobs_outer, dlogprobs_inner))
    if dentropy_ptr is not None:
        h = tl.load(dentropy_ptr + row_offset(row, inner, dentropy_outer, dentropy_inner))
        entropy = tl.load(entropy_ptr + row)
    live = (label != ignore_index) & (lse != float("-inf"))  # else nothing is read, and zeros are written
    per_nat = 1.0 / temperature
    # z - lse = (x - center)/temperature - rest; exact for near-equal x and center
    center = tl.where(live, lse * temperature, 0.0)
    rest = tl.where(live, lse - center * per_nat, 0.0)
    redo = live & (tl.abs(lse) > REDO)
    if redo:
        top, total, _ = row_stats(row_ptr, V, per_nat * LOG2E, softcap, BLOCK, GROUP, APART, SOFTCAP, False)
        whole = tl.abs(top * per_nat + tl.log(total) - lse) <= 1e-6 * tl.abs(lse)  # else lse is of all shards of V
        center = tl.where(whole, top, center)
        rest = tl.where(whole, tl.log(total), rest)
    g = tl.where(((label < 0) & (label != FOREIGN)) | (label >= V), float("nan"), g)  # no label: NaN as in the forward
    end = tl.where(live, V, 0)
    lanes = tl.arange(0, BLOCK)
    ahead = tl.load(row_ptr + lanes, mask=lanes < end, other=0.0)
    for start in range(0, V, BLOCK):
        cols = start + lanes
        x = ahead.to(tl.float32)
        ahead = tl.load(row_ptr + BLOCK + cols, mask=BLOCK + cols < end, other=0.0)
        slope = per_nat
        if SOFTCAP:
            t = tanh(x / softcap)
            x = softcap * t
            slope = per_nat * (1.0 - t * t)
        logp = (x - center) * per_nat - rest
        p = tl.exp2(logp * LOG2E)
        dz = tl.where(cols == label, g, 0.0) - g * p
        if dentropy_ptr is not None:
            dz -= h * tl.where(p == 0.0, 0.0, p * (logp + entropy))
        tl.store(out_row + cols, narrow(tl.where(live, dz * slope, 0.0), out_ptr.dtype.element_ty), mask=cols < V)


def constants(vocab: int, element_size: int) -> dict[str, int]:
    """From V and the dtype alone: 8 KiB a step over 256 threads, at least 1024 logits."""
    block, warps = (1024, 4) if vocab <= 1024 else (8192 // element_size, 8)
    return {"BLOCK": block, "num_warps": warps, **grouping(vocab, element_size, block, warps)}


def grouping(vocab: int, element_size: int, block: int, warps: int) -> dict[str, int]:
    """Which logits of a block are one thread's: those of one load of 16 B; where rows start anywhere, and a thread
    loads single logits, all of them, as far apart as there are threads."""
    if vocab % 16 == 0:
        return {"GROUP": 16 // element_size, "APART": False}
    return {"GROUP": max(1, block // (32 * warps)), "APART": True}


def redo_above(dtype: torch.dtype) -> float:
    """|lse| above which its own rounding (2^-25 of it, relative to p) would be seen in gradients of this dtype."""
    return 16.0 if dtype == torch.float32 else 512.0


def token_logprobs_triton(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, entropy: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = logits.shape[-1]
    _, inner, *logits_strides = checks.rows("token_logprobs", "logits", logits.shape[:-1], logits.stride()[:-1])
    labels_strides = checks.rows("token_logprobs", "labels", labels.shape, labels.stride())[2:]
    logprobs = logits.new_empty(labels.shape, dtype=torch.float32)
    lse = torch.empty_like(logprobs)
    ent = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
    if labels.numel():
        launch(
            _token_logprobs_kernel, (labels.numel(),), logits, labels, logprobs, ent if entropy else None, lse, vocab,
            inner, *logits_strides, *labels_strides, temperature, softcap, ignore_index,
            SOFTCAP=softcap > 0.0, **constants(vocab, logits.element_size()),
        )  # fmt: skip
    return logprobs, ent, lse


def token_logprobs_backward_triton(
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
    op, vocab = "token_logprobs", logits.shape[-1]
    _, inner, *logits_strides = checks.rows(op, "logits", logits.shape[:-1], logits.stride()[:-1])
    labels_strides = checks.rows(op, "labels", labels.shape, labels.stride())[2:]
    dlogits = logits.new_empty(logits.shape) if out is None else out
    out_strides = checks.rows(op, "out", dlogits.shape[:-1], dlogits.stride()[:-1])[2:]
    dlogprobs, dlogprobs_strides = _walkable(dlogprobs)
    dentropy, dentropy_strides = _walkable(dentropy)
    if labels.numel():
        launch(
            _token_logprobs_backward_kernel, (labels.numel(),), logits, dlogits, labels, lse,
            entropy if dentropy is not None else None, dlogprobs, dentropy, vocab, inner, *logits_strides, *out_strides,
            *labels_strides, *dlogprobs_strides, *dentropy_strides, temperature, softcap, ignore_index,
            SOFTCAP=softcap > 0.0, REDO=redo_above(logits.dtype), **constants(vocab, logits.element_size()),
        )  # fmt: skip
    return dlogits


def _walkable(grad: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """The gradient (one number a row) with its two strides; of three or more dimensions, made contiguous first."""
    if grad is None:
        return None, (0, 0)
    if grad.ndim > 2:
        grad = grad.contiguous()
    return grad, checks.rows("token_logprobs", "gradient", grad.shape, grad.stride())[2:]


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    shapes = [(d, v) for d in (torch.float32, torch.bfloat16) for v in (1000, 50257, 151936)] + [
        (torch.float16, 151936)
    ]
    for (dtype, vocab), (cap, ent) in itertools.product(shapes, ((0.0, False), (0.0, True), (30.0, True))):
        x, y, row = floats(64, vocab, dtype=dtype), integers(64), floats(64)
        name = f"{str(dtype)[6:]} V={vocab}{' softcap' if cap else ''}{' entropy' if ent else ''}"
        yield name, partial(token_logprobs_triton, x, y, 1.0, cap, ent, -100)
        upstream = row, row if ent else None
        yield name, partial(token_logprobs_backward_triton, *upstream, x, y, row, row, 1.0, cap, -100)
