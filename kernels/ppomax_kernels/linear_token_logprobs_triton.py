# mypy: allow-untyped-defs
"""Log-probability of each label and entropy of each row, straight from hidden states and the head's weight, forward
only, without ever writing a logit: for scoring with a policy or reference that gets no gradient.
x = hidden . weight + bias (then the softcap), and the row statistics of token_logprobs_triton.py over x.

First launch: a program has BLOCK_N tokens and SPLIT columns of V. It makes their logits tile by tile on the tensor
cores (dtype of the input, fp32 sums), and folds each tile into the running maximum, sum and weighted sum of its rows;
the tile dies in registers. Programs that share columns run side by side, so the weight comes out of L2. Second launch:
the parts of a row, from SPLIT columns each, are combined in order, starting from -inf.
2NVD FLOPs; HBM sees hidden and weight about once, and 16 B a token and part (10 MB at N = 8192, V = 151936), where
logits would be 2 B a token and column written and read (5 GB). Tiles are 128 x 128: with 128 x 256, which ask less of
L2, the statistics no longer fit into registers beside the sums, and spill. SPLIT depends on nothing, so a row's bits do
not depend on N. A tile of rows that are all ignored computes nothing.
Left out on purpose: the backward (on chunks, see linear_token_logprobs.py), and a choice of this kernel by itself: it
is to be chosen where it has been measured to be faster than GEMM and row kernel on chunks."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends.launch_triton import Case, backend, floats, integers, launch
from .backends.math_triton import INTERPRETED, LOG2E, tanh
from .token_logprobs_triton import FOREIGN

SPLIT = 2048
PARTS = 4  # of each row and split: maximum, sum e, sum e*d, the label's logit
COMBINE_BLOCK = 128


@triton.jit
def _fold(top, total, weighted, top2, total2, weighted2, scale):
    """Statistics of two sets of logits together; a set of nothing but -inf is (-inf, 0, 0)."""
    both = tl.maximum(top, top2)
    safe = tl.where(both == float("-inf"), 0.0, both)
    shift, shift2 = tl.exp2((top - safe) * scale), tl.exp2((top2 - safe) * scale)
    moved = tl.where(shift == 0.0, 0.0, shift * (weighted + total * tl.where(shift == 0.0, 0.0, top - safe)))
    moved2 = tl.where(shift2 == 0.0, 0.0, shift2 * (weighted2 + total2 * tl.where(shift2 == 0.0, 0.0, top2 - safe)))
    return both, total * shift + total2 * shift2, moved + moved2


@triton.jit(
    do_not_specialize=["N", "labels_stride", "ignore_index"], do_not_specialize_on_alignment=["labels_ptr", "bias_ptr"]
)
def _linear_token_logprobs_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, parts_ptr, N, V, D, hidden_stride, weight_stride, labels_stride,
    temperature, softcap, ignore_index, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles
    rows = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    safe_rows = tl.minimum(
        rows, N - 1
    )  # rows and columns beyond the end repeat the last one: loads need no mask for them
    labels = tl.load(labels_ptr + safe_rows * labels_stride)
    scale = LOG2E / temperature
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    picked = tl.zeros((BLOCK_N,), tl.float32)
    depth = tl.arange(0, BLOCK_D)
    counted = tl.max(tl.where(inside & (labels != ignore_index), 1, 0), 0)
    first = split * SPLIT
    stop = tl.where(counted > 0, tl.minimum(first + SPLIT, V), first)
    for start in range(first, stop, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        safe_columns = tl.minimum(columns, V - 1).to(tl.int64)
        hidden_ptrs = hidden_ptr + safe_rows[:, None] * hidden_stride + depth[None, :]
        weight_ptrs = weight_ptr + safe_columns[None, :] * weight_stride + depth[:, None]
        x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(0, D, BLOCK_D):
            h = tl.load(hidden_ptrs + k, mask=k + depth[None, :] < D, other=0.0)
            w = tl.load(weight_ptrs + k, mask=k + depth[:, None] < D, other=0.0)
            if INTERPRETED:  # its dot takes bf16 for integers
                h, w = h.to(tl.float32), w.to(tl.float32)
            x = tl.dot(h, w, x, input_precision=PRECISION)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + safe_columns).to(tl.float32)[None, :]
        if SOFTCAP:
            x = softcap * tanh(x / softcap)
        x = tl.where((columns < V)[None, :], x, float("-inf"))
        picked += tl.sum(tl.where(columns[None, :] == labels[:, None], x, 0.0), 1)
        new_top = tl.maximum(top, tl.max(x, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        shift = tl.exp2((top - safe_top) * scale)
        moved = tl.where(shift == 0.0, 0.0, shift * (weighted + total * tl.where(shift == 0.0, 0.0, top - safe_top)))
        d = x - safe_top[:, None]
        e = tl.exp2(d * scale)
        weighted = moved + tl.sum(e * tl.where(e == 0.0, 0.0, d), 1)
        total = total * shift + tl.sum(e, 1)
        top = new_top
    part = parts_ptr + split.to(tl.int64) * 4 * N + rows
    tl.store(part, top, mask=inside)
    tl.store(part + N, total, mask=inside)
    tl.store(part + 2 * N, weighted, mask=inside)
    tl.store(part + 3 * N, picked, mask=inside)


@triton.jit(
    do_not_specialize=["N", "V", "splits", "labels_stride", "ignore_index"],
    do_not_specialize_on_alignment=["labels_ptr"],
)
def _linear_token_logprobs_combine_kernel(
    parts_ptr, labels_ptr, logprobs_ptr, entropy_ptr, lse_ptr, N, V, splits, labels_stride, temperature, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    per_nat = 1.0 / temperature
    part = parts_ptr + rows
    for _ in range(splits):
        top2 = tl.load(part, mask=inside, other=float("-inf"))
        total2 = tl.load(part + N, mask=inside, other=0.0)
        weighted2 = tl.load(part + 2 * N, mask=inside, other=0.0)
        picked += tl.load(part + 3 * N, mask=inside, other=0.0)
        top, total, weighted = _fold(top, total, weighted, top2, total2, weighted2, per_nat * LOG2E)
        part += 4 * N.to(tl.int64)
    label = tl.load(labels_ptr + rows * labels_stride, mask=inside, other=0)
    keep = label != ignore_index
    valid = (label >= 0) & (label < V)
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    log_total = tl.log(total)
    logprob = tl.where(dead, float("-inf"), (picked - tl.where(dead, 0.0, top)) * per_nat - log_total)
    logprob = tl.where(valid, logprob, tl.where(label == FOREIGN, 0.0, float("nan")))
    tl.store(logprobs_ptr + rows, tl.where(keep, logprob, 0.0), mask=inside)
    lse = tl.where(dead, float("-inf"), top * per_nat + log_total)
    tl.store(lse_ptr + rows, tl.where(keep, lse, 0.0), mask=inside)
    if entropy_ptr is not None:
        entropy = tl.where(dead, 0.0, log_total - weighted / total * per_nat)
        tl.store(entropy_ptr + rows, tl.where(keep, entropy, 0.0), mask=inside)


def constants(dtype: torch.dtype, aligned: bool, chips: str) -> dict[str, int | str]:
    """Tile, warps and stages. 16-bit on NVIDIA: 128 x 128 x 64 in four stages, 128 KiB of shared memory, which an A100
    has too; AMD has 64. Small tiles for float32, which is exact (no tf32), so runs on the plain cores, and for rows
    that do not start at multiples of 16, whose narrow loads pass through registers."""
    if dtype == torch.float32 or not aligned:
        return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "PRECISION": "ieee", "num_warps": 8, "num_stages": 2}
    stages = 4 if chips == "cuda" else 2
    return {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64, "PRECISION": "tf32", "num_warps": 8, "num_stages": stages}


def linear_token_logprobs_triton(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    entropy: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D) and weight (V, D) of one dtype, rows strided as they like; labels (N,), bias (V,) or None."""
    (n, depth), vocab = hidden.shape, weight.shape[0]
    logprobs = hidden.new_empty((n,), dtype=torch.float32)
    lse = torch.empty_like(logprobs)
    ent = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
    if n:
        aligned = not (depth | hidden.stride(0) | weight.stride(0)) % 16
        chosen = constants(hidden.dtype, aligned, backend())
        splits = triton.cdiv(vocab, SPLIT)
        parts = logprobs.new_empty((splits, PARTS, n))
        launch(
            _linear_token_logprobs_kernel, (triton.cdiv(n, chosen["BLOCK_N"]) * splits,), hidden, weight, bias, labels,
            parts, n, vocab, depth, hidden.stride(0), weight.stride(0), labels.stride(0), temperature, softcap,
            ignore_index, SOFTCAP=softcap > 0.0, SPLIT=SPLIT, **chosen,
        )  # fmt: skip
        launch(
            _linear_token_logprobs_combine_kernel, (triton.cdiv(n, COMBINE_BLOCK),), parts, labels, logprobs,
            ent if entropy else None, lse, n, vocab, splits, labels.stride(0), temperature, ignore_index,
            BLOCK=COMBINE_BLOCK, num_warps=4,
        )  # fmt: skip
    return logprobs, ent, lse


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    labels = integers(4096)
    for dtype, depth, full in itertools.product((torch.float32, torch.bfloat16), (4096, 4100), (False, True)):
        hidden, weight = floats(4096, depth, dtype=dtype), floats(151936, depth, dtype=dtype)
        bias, cap = (floats(151936, dtype=dtype), 30.0) if full else (None, 0.0)
        name = f"{str(dtype)[6:]} D={depth}{' bias, softcap, entropy' if full else ''}"
        yield name, partial(linear_token_logprobs_triton, hidden, weight, labels, bias, 1.0, cap, full, -100)
