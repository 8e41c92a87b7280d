# mypy: allow-untyped-defs
"""Clipped PPO policy loss, all its metrics and each token's gradient, in one pass over the tokens.
u = clamp(logprob - old, +-20), w = e^u: l = max(-A*w, -A*clip(w, 1-clip_low, 1+clip_high)) ; for A < 0 min(l,
-A*dual_clip) ; times the importance weight. dl/dlogprob = -A*w where neither clip decides and u was not clamped, else
0. A KL term is added with its gradient, the entropy bonus without (its gradient is one constant, see ppo_loss.py).
Reads 12 to 25 B a token in fp32 and writes 4 B if a gradient is wanted, instead of eager torch's thirty launches or so.
Sums: see reduce_triton.py (one launch up to 8192 tokens, two beyond). The gradient written is that of the masked sum;
the backward scales it by `scale`, which only the end of this pass knows.
Left out on purpose: atomics (order), and reading anything back."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import reduce_triton as plan
from .backends.launch_triton import Case, floats, integers, launch, mask_bytes
from .backends.math_triton import LOG_RATIO_LIMIT, clamp, exp, exp_minus_1_minus_x
from .backends.reduce_triton import kept, one_over, total
from .kl_penalty_triton import kl_slope, kl_term
from .metrics import POLICY_METRICS
from .terms import PolicyTokens, PpoTerms

COLUMNS = len(POLICY_METRICS)


@triton.jit
def policy_terms(logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip):
    """Per token: loss, its slope in logprob, ratio, log-ratio, whether the clip decided, whether the dual clip did."""
    u = logprobs - old_logprobs
    log_ratio = clamp(u, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = exp(log_ratio)
    plain = -advantages * ratio
    bounded = -advantages * clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    was_clipped = bounded > plain
    loss = tl.where(was_clipped, bounded, plain)
    was_dual = (dual_clip > 0.0) & (advantages < 0.0) & (loss > -advantages * dual_clip)
    loss = tl.where(was_dual, -advantages * dual_clip, loss)
    slope = tl.where(was_clipped | was_dual | (tl.abs(u) > LOG_RATIO_LIMIT), 0.0, plain)
    return loss, slope, ratio, log_ratio, was_clipped, was_dual


@triton.jit
def _write(
    pg_loss, approx_kl, clipfrac, dual_clipfrac, ratio_mean, ratio_max, kl, entropy, tokens, ratio_gap,
    loss_ptr, metrics_ptr, scale_ptr, normalizer_ptr, norm_value, kl_coef, ent_coef,
):  # fmt: skip
    """Sums over tokens -> loss, metrics in the order of ppo_loss.METRICS, scale."""
    scale = one_over(tokens, normalizer_ptr, norm_value)
    tl.store(loss_ptr, pg_loss * scale + kl_coef * (kl * scale) - ent_coef * (entropy * scale))
    tl.store(scale_ptr, scale)
    tl.store(metrics_ptr, pg_loss * scale)
    tl.store(metrics_ptr + 1, approx_kl * scale)
    tl.store(metrics_ptr + 2, clipfrac * scale)
    tl.store(metrics_ptr + 3, dual_clipfrac * scale)
    tl.store(metrics_ptr + 4, ratio_mean * scale)
    tl.store(metrics_ptr + 5, ratio_max)
    tl.store(metrics_ptr + 6, kl * scale)
    tl.store(metrics_ptr + 7, entropy * scale)
    tl.store(metrics_ptr + 8, tokens)
    tl.store(metrics_ptr + 9, ratio_gap)


@triton.jit(do_not_specialize=["N", "chunk"], do_not_specialize_on_alignment=["normalizer_ptr"])
def _ppo_loss_kernel(
    logprobs_ptr, old_logprobs_ptr, advantages_ptr, mask_ptr, is_weights_ptr, ref_logprobs_ptr, entropy_ptr,
    dlogprobs_ptr, scratch_ptr, loss_ptr, metrics_ptr, scale_ptr, normalizer_ptr, N, chunk, norm_value, clip_low,
    clip_high, dual_clip, kl_coef, ent_coef, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, N)
    lanes = tl.arange(0, BLOCK)
    pg_loss = tl.zeros((BLOCK,), tl.float32)
    approx_kl = tl.zeros((BLOCK,), tl.float32)
    clipfrac = tl.zeros((BLOCK,), tl.float32)
    dual_clipfrac = tl.zeros((BLOCK,), tl.float32)
    ratio_mean = tl.zeros((BLOCK,), tl.float32)
    ratio_max = tl.zeros((BLOCK,), tl.float32)
    ratio_gap = tl.zeros((BLOCK,), tl.float32)
    kl = tl.zeros((BLOCK,), tl.float32)
    entropy = tl.zeros((BLOCK,), tl.float32)
    tokens = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        at = first + lanes
        keep = kept(mask_ptr, at, stop)
        logprobs = tl.load(logprobs_ptr + at, mask=keep, other=0.0).to(tl.float32)
        old_logprobs = tl.load(old_logprobs_ptr + at, mask=keep, other=0.0).to(tl.float32)
        advantages = tl.load(advantages_ptr + at, mask=keep, other=0.0).to(tl.float32)
        loss, slope, ratio, log_ratio, was_clipped, was_dual = policy_terms(
            logprobs, old_logprobs, advantages, clip_low, clip_high, dual_clip
        )
        if is_weights_ptr is not None:
            weight = tl.load(is_weights_ptr + at, mask=keep, other=0.0).to(tl.float32)
            loss *= weight
            slope *= weight
        if ref_logprobs_ptr is not None:
            u = logprobs - tl.load(ref_logprobs_ptr + at, mask=keep, other=0.0).to(tl.float32)
            kl += tl.where(keep, kl_term(u, ESTIMATOR), 0.0)
            slope += kl_coef * kl_slope(u, ESTIMATOR)
        if entropy_ptr is not None:
            entropy += tl.load(entropy_ptr + at, mask=keep, other=0.0).to(tl.float32)
        if dlogprobs_ptr is not None:
            tl.store(dlogprobs_ptr + at, tl.where(keep, slope, 0.0), mask=at < stop)
        pg_loss += tl.where(keep, loss, 0.0)
        approx_kl += exp_minus_1_minus_x(log_ratio)  # 0 where nothing was loaded
        clipfrac += tl.where(was_clipped, 1.0, 0.0)
        dual_clipfrac += tl.where(was_dual, 1.0, 0.0)
        ratio_mean += tl.where(keep, ratio, 0.0)
        ratio_max = tl.maximum(ratio_max, tl.where(keep, ratio, 0.0))
        ratio_gap = tl.maximum(ratio_gap, tl.abs(ratio - 1.0))  # 0 where nothing was loaded
        tokens += tl.where(keep, 1.0, 0.0)
    if scratch_ptr is None:
        _write(
            tl.sum(pg_loss, 0), tl.sum(approx_kl, 0), tl.sum(clipfrac, 0), tl.sum(dual_clipfrac, 0),
            tl.sum(ratio_mean, 0), tl.max(ratio_max, 0), tl.sum(kl, 0), tl.sum(entropy, 0), tl.sum(tokens, 0),
            tl.max(ratio_gap, 0), loss_ptr, metrics_ptr, scale_ptr, normalizer_ptr, norm_value, kl_coef, ent_coef,
        )  # fmt: skip
    else:
        row = scratch_ptr + tl.program_id(0)
        count = tl.num_programs(0).to(tl.int64)
        tl.store(row, tl.sum(pg_loss, 0))
        tl.store(row + count, tl.sum(approx_kl, 0))
        tl.store(row + 2 * count, tl.sum(clipfrac, 0))
        tl.store(row + 3 * count, tl.sum(dual_clipfrac, 0))
        tl.store(row + 4 * count, tl.sum(ratio_mean, 0))
        tl.store(row + 5 * count, tl.max(ratio_max, 0))
        tl.store(row + 6 * count, tl.sum(kl, 0))
        tl.store(row + 7 * count, tl.sum(entropy, 0))
        tl.store(row + 8 * count, tl.sum(tokens, 0))
        tl.store(row + 9 * count, tl.max(ratio_gap, 0))


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["normalizer_ptr"])
def _ppo_loss_finish_kernel(
    scratch_ptr, loss_ptr, metrics_ptr, scale_ptr, normalizer_ptr, count, norm_value, kl_coef, ent_coef,
    ROWS: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, ROWS)
    ratio_max = tl.zeros((ROWS,), tl.float32)
    ratio_gap = tl.zeros((ROWS,), tl.float32)
    for start in range(0, count, ROWS):
        at = start + lanes
        ratio_max = tl.maximum(ratio_max, tl.load(scratch_ptr + 5 * count + at, mask=at < count, other=0.0))
        ratio_gap = tl.maximum(ratio_gap, tl.load(scratch_ptr + 9 * count + at, mask=at < count, other=0.0))
    _write(
        total(scratch_ptr, 0, count, ROWS), total(scratch_ptr, 1, count, ROWS), total(scratch_ptr, 2, count, ROWS),
        total(scratch_ptr, 3, count, ROWS), total(scratch_ptr, 4, count, ROWS), tl.max(ratio_max, 0),
        total(scratch_ptr, 6, count, ROWS), total(scratch_ptr, 7, count, ROWS), total(scratch_ptr, 8, count, ROWS),
        tl.max(ratio_gap, 0), loss_ptr, metrics_ptr, scale_ptr, normalizer_ptr, norm_value, kl_coef, ent_coef,
    )  # fmt: skip


def ppo_loss_triton(
    logprobs: Tensor, tokens: PolicyTokens, entropy: Tensor | None, terms: PpoTerms, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old_logprobs, advantages, mask, is_weights, ref_logprobs = tokens
    normalizer, norm_value, clip_low, clip_high, dual_clip, kl_coef, estimator, ent_coef = terms
    out = plan.loss_outputs(logprobs, COLUMNS, normalizer, need_grad)
    launch(
        _ppo_loss_kernel, (out.programs,), logprobs, old_logprobs, advantages, mask_bytes(mask), is_weights,
        ref_logprobs, entropy, out.gradient if need_grad else None, out.partial, *out.results, logprobs.numel(),
        out.chunk, norm_value, clip_low, clip_high, dual_clip, kl_coef, ent_coef, ESTIMATOR=estimator,
        BLOCK=plan.BLOCK, num_warps=plan.WARPS,
    )  # fmt: skip
    if out.partial is not None:
        launch(
            _ppo_loss_finish_kernel, (1,), out.partial, *out.results, out.programs, norm_value, kl_coef, ent_coef,
            ROWS=plan.ROWS, num_warps=4,
        )  # fmt: skip
    return out.loss, out.metrics, out.gradient, out.scale


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    for dtype, n, full in itertools.product((torch.float32, torch.bfloat16), (4096, 65536), (False, True)):
        z, m = floats(n, dtype=dtype), integers(n, dtype=torch.bool) if full else None
        name, norm = f"{str(dtype)[6:]} N={n}{' mask, gradient' if full else ''}", floats() if full else None
        terms = PpoTerms(norm, 0.0, 0.2, 0.2, 0.0, 0.0, "k3", 0.0)
        yield name, partial(ppo_loss_triton, z, PolicyTokens(z, z, m, None, None), None, terms, full)
        for est in ("k3", "k2") if full else ():
            terms = PpoTerms(norm, 0.0, 0.2, 0.2, 3.0, 0.1, est, 0.01)
            losses = partial(ppo_loss_triton, z, PolicyTokens(z, z, m, z, z), z, terms, True)
            yield f"{name}, entropy, weights, {est}", losses
