# mypy: allow-untyped-defs
"""One token a row from softmax(logits/temperature), cut to the top k and then to the top p; one program a row.

Nothing is sorted. Logits x keep the order of z = x/temperature, so both cuts are thresholds on x, found by halving the
interval of values: each pass over the row sums the weight (1 for top k, e for top p) at or above the middle, and the
new bound is the nearest logit itself, so the search ends, on a logit, after some 15 to 20 passes of a 32000-word row.
Then a pass in which each thread sums a stretch of the row, a scan over threads for the one in whose stretch the
cumulative weight passes u * total, and a scan of that stretch alone. Statistics of softmax(logits) come with the first
pass.
HBM reads V once (2 B a logit in bf16); all further passes find the row in L2 (64 rows of 152k bf16 logits are 20 MB).
Sums are fp32 a lane and fp64 across lanes; no loop has a barrier. u is Philox4x32-10 with the seed as key and the
position as counter, so a row's draw does not depend on its batch. Rows with NaN, +inf or nothing above -inf give token
-1 and NaN.
Left out on purpose: several programs a row, which would pay for few rows only."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends.launch_triton import Case, backend, floats, integers, launch
from .backends.math_triton import LOG2E
from .token_logprobs_triton import grouping, row_stats


@triton.jit
def _uniform(seed, position):
    """(first word of Philox4x32-10 >> 8, plus 1/2) / 2^24, as fp64: exact, and in (0, 1)."""
    low = 0xFFFFFFFF
    k0 = seed & low
    k1 = (seed >> 32) & low
    c0 = (position & low).to(tl.uint64)
    c1 = ((position >> 32) & low).to(tl.uint64)
    c2 = c0 * 0
    c3 = c0 * 0
    k0 = k0.to(tl.uint64)
    k1 = k1.to(tl.uint64)
    for _ in tl.static_range(10):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0 = (product1 >> 32) ^ c1 ^ k0
        c2 = (product0 >> 32) ^ c3 ^ k1
        c1 = product1 & low
        c3 = product0 & low
        k0 = (k0 + 0x9E3779B9) & low
        k1 = (k1 + 0xBB67AE85) & low
    return ((c0 >> 8).to(tl.int32).to(tl.float64) + 0.5) * 5.9604644775390625e-08


@triton.jit
def _weight(x, top, scale):
    return tl.exp2((x - top) * scale)


@triton.jit
def _at_or_above(row_ptr, end, middle, top, scale, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(weight of the logits >= middle, the lowest of them, the highest logit below)."""
    lanes = tl.arange(0, BLOCK)
    weight = tl.zeros((BLOCK,), tl.float32)
    above = tl.full((BLOCK,), float("inf"), tl.float32)
    below = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, end, BLOCK):
        x = tl.load(row_ptr + start + lanes, mask=start + lanes < end, other=float("-inf")).to(tl.float32)
        inside = x >= middle
        if COUNT:
            weight += tl.where(inside, 1.0, 0.0)
        else:
            weight += tl.where(inside, _weight(x, top, scale), 0.0)
        above = tl.minimum(above, tl.where(inside, x, float("inf")))
        below = tl.maximum(below, tl.where(inside, float("-inf"), x))
    return tl.sum(weight.to(tl.float64), 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _threshold(row_ptr, end, wanted, low, top, scale, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The highest logit t >= low such that the logits >= t weigh `wanted` or more; low, a logit, if there is none."""
    high = top
    while low < high:
        middle = 0.5 * low + 0.5 * high
        middle = tl.where(middle > low, middle, high)
        weight, above, below = _at_or_above(row_ptr, end, middle, top, scale, COUNT, BLOCK)
        enough = weight >= wanted
        low = tl.where(enough, above, low)
        high = tl.where(enough, high, below)
    return low


@triton.jit
def _draw(row_ptr, V, end, threshold, u, top, scale, LANES: tl.constexpr, WIDE: tl.constexpr, SPAN: tl.constexpr):
    """(token, total weight): the first token whose cumulative weight passes u * total. Each lane sums a stretch of the
    row, so that the loop has no barrier; then the lane is found, and the token in its stretch."""
    stretch = tl.cdiv(V, LANES * WIDE) * WIDE
    lane = tl.arange(0, LANES)
    wide = tl.arange(0, WIDE)
    own = tl.zeros((LANES,), tl.float32)
    for start in range(0, stretch, WIDE):
        at = lane[:, None] * stretch + (start + wide)[None, :]
        x = tl.load(row_ptr + at, mask=at < end, other=float("-inf")).to(tl.float32)
        own += tl.sum(tl.where(x >= threshold, _weight(x, top, scale), 0.0), 1)
    running = tl.cumsum(own.to(tl.float64), 0)
    total = tl.max(running, 0)
    goal = u * total
    first = tl.min(tl.where((own > 0.0) & (running > goal), lane, LANES), 0)
    last = tl.max(tl.where(own > 0.0, lane, 0), 0)
    chosen = tl.minimum(first, last)
    before = tl.max(tl.where(lane < chosen, running, 0.0), 0)
    span = tl.arange(0, SPAN)
    at = chosen * stretch + span
    x = tl.load(row_ptr + at, mask=(span < stretch) & (at < end), other=float("-inf")).to(tl.float32)
    weight = tl.where(x >= threshold, _weight(x, top, scale), 0.0)
    hit = (weight > 0.0) & (before + tl.cumsum(weight.to(tl.float64), 0) > goal)
    first = tl.min(tl.where(hit, span, SPAN), 0)
    last = tl.max(tl.where(weight > 0.0, span, 0), 0)  # the scan may round to just under the lane's sum
    return chosen * stretch + tl.minimum(first, last), total


@triton.jit
def _first_of(row_ptr, end, value, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    first = tl.zeros((), tl.int32) + end
    for start in range(0, end, BLOCK):
        x = tl.load(row_ptr + start + lanes, mask=start + lanes < end, other=float("-inf")).to(tl.float32)
        first = tl.minimum(first, tl.min(tl.where(x == value, start + lanes, end), 0))
    return first


@triton.jit(do_not_specialize=["top_k"], do_not_specialize_on_alignment=["seeds_ptr", "positions_ptr"])
def _sample_kernel(
    logits_ptr, seeds_ptr, positions_ptr, token_ptr, logprob_ptr, plain_ptr, entropy_ptr, V, stride, temperature, top_k,
    top_p, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    APART: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    top, plain_total, weighted = row_stats(row_ptr, V, LOG2E, 1.0, BLOCK, GROUP, APART, False, True)
    good = plain_total > 0.0  # NaN: a NaN or +inf logit; 0: nothing above -inf
    end = tl.where(good, V, 0)
    top = tl.where(good, top, 0.0)
    logprob = tl.zeros((), tl.float32)
    if GREEDY:
        token = _first_of(row_ptr, end, top, BLOCK)
    else:
        scale = LOG2E / temperature
        threshold = tl.full((), float("-inf"), tl.float32)
        if TOP_K or TOP_P:
            least = -3.4028234663852886e38  # of finite floats: the first pass gives the lowest logit, and all weight
            everything, threshold, _ = _at_or_above(row_ptr, end, least, top, scale, False, BLOCK)
            threshold = tl.where(good, threshold, top)
            if TOP_K:
                threshold = _threshold(row_ptr, end, top_k, threshold, top, scale, True, BLOCK)
                everything, threshold, _ = _at_or_above(row_ptr, end, threshold, top, scale, False, BLOCK)
                threshold = tl.where(good, threshold, top)
            if TOP_P:
                threshold = _threshold(row_ptr, end, top_p * everything, threshold, top, scale, False, BLOCK)
        u = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        token, total = _draw(row_ptr, V, end, threshold, u, top, scale, LANES, WIDE, SPAN)
        total = tl.where(good, total, 1.0).to(tl.float32)
        picked = tl.load(row_ptr + token, mask=good, other=0.0).to(tl.float32)
        logprob = tl.minimum((picked - top) / temperature - tl.log(total), 0.0)
    plain_total = tl.where(good, plain_total, 1.0)
    picked = tl.load(row_ptr + token, mask=good, other=0.0).to(tl.float32)
    plain = picked - top - tl.log(plain_total)
    entropy = tl.log(plain_total) - weighted / plain_total
    tl.store(token_ptr + row, tl.where(good, token.to(tl.int64), -1))
    tl.store(logprob_ptr + row, tl.where(good, logprob, float("nan")))
    tl.store(plain_ptr + row, tl.where(good, plain, float("nan")))
    tl.store(entropy_ptr + row, tl.where(good, entropy, float("nan")))


def constants(vocab: int, element_size: int, chips: str) -> dict[str, int]:
    """Few rows and many dependent passes: 512 threads a row, one 16 B load each, or 4 logits where rows start anywhere
    and loads are narrow. NVIDIA's assembler is told that it may use 128 registers (all that 512 threads can have): left
    to itself it spills a few bytes to stay under 40 or 64, for more programs a multiprocessor than there are rows."""
    block, warps = (1024, 8) if vocab <= 1024 else (8192 // element_size if vocab % 16 == 0 else 2048, 16)
    limit = {"maxnreg": 128} if chips == "cuda" else {}
    lanes, wide = 32 * warps, 16 // element_size if vocab % 16 == 0 else 1
    span = triton.next_power_of_2(triton.cdiv(vocab, lanes * wide) * wide)
    draw = {"LANES": lanes, "WIDE": wide, "SPAN": span}
    return {"BLOCK": block, "num_warps": warps, **draw, **grouping(vocab, element_size, block, warps)} | limit


def sample_triton(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    token = logits.new_empty((rows,), dtype=torch.int64)
    logprob, plain_logprob, entropy = (logits.new_empty((rows,), dtype=torch.float32) for _ in range(3))
    if rows:
        launch(
            _sample_kernel, (rows,), logits, seeds, positions, token, logprob, plain_logprob, entropy, vocab,
            logits.stride(0), temperature, top_k, top_p, GREEDY=temperature == 0.0, TOP_K=0 < top_k < vocab,
            TOP_P=top_p < 1.0, **constants(vocab, logits.element_size(), backend()),
        )  # fmt: skip
    return token, logprob, plain_logprob, entropy


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    kinds = ((torch.float32, 1000), (torch.float32, 151936), (torch.bfloat16, 151936), (torch.bfloat16, 50257))
    for dtype, vocab in kinds:
        x, seeds = floats(8, vocab, dtype=dtype), integers(8)
        for temperature, k, p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 50, 1.0), (1.0, 0, 0.9), (1.0, 50, 0.9)):
            name = f"{str(dtype)[6:]} V={vocab} temperature={temperature:g} k={k} p={p:g}"
            yield name, partial(sample_triton, x, seeds, seeds, temperature, k, p)
