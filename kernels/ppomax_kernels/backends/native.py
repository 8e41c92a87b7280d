"""The public ops on CPUs, by the compiled library: each function allocates its results, hands over pointers, and turns
a status into an error. A call costs some 5 us, so nothing is computed here that the C side can compute."""

import torch
from torch import Tensor, contiguous_format, empty, empty_like, float32, get_num_threads

from .. import checks
from ..metrics import POLICY_METRICS, VALUE_METRICS
from ..terms import PolicyTokens, PpoTerms
from .abi import BAD_LABEL, BAD_LOGITS, BAD_SEQLENS, DTYPES, ESTIMATORS, library, refuse
from .native_arguments import array, at, new_like, upstream

POLICY, VALUE = len(POLICY_METRICS), len(VALUE_METRICS)


def token_logprobs_cpu(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, entropy: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape, strides, vocab = labels.shape, logits.stride(), logits.shape[-1]
    outer, inner, outer_stride, inner_stride = checks.rows("token_logprobs", "logits", shape, strides[:-1])
    _, _, labels_outer, labels_inner = checks.rows("token_logprobs", "labels", shape, labels.stride())
    logprobs, lse = new_like(labels), new_like(labels)
    ent = new_like(labels) if entropy else empty(0, dtype=float32)
    status = library().ppomax_token_logprobs_cpu(
        logits.data_ptr(), DTYPES[logits.dtype], outer, inner, vocab, outer_stride, inner_stride,
        labels.data_ptr(), labels_outer, labels_inner, temperature, softcap, ignore_index,
        logprobs.data_ptr(), ent.data_ptr() if entropy else None, lse.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_LABEL:
            checks.labels_values("token_logprobs", labels, vocab, ignore_index)
        refuse("token_logprobs", status)
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
    outer, inner, outer_stride, inner_stride = checks.rows(op, "logits", shape, logits.stride()[:-1])
    _, _, labels_outer, labels_inner = checks.rows(op, "labels", shape, labels.stride())
    dlogprobs, dl_outer, dl_inner = upstream(op, "dlogprobs", dlogprobs)
    dentropy, dh_outer, dh_inner = upstream(op, "dentropy", dentropy)
    dlogits = empty_like(logits, memory_format=contiguous_format) if out is None else out
    status = library().ppomax_token_logprobs_backward_cpu(
        at(dlogprobs), dl_outer, dl_inner, at(dentropy), dh_outer, dh_inner, logits.data_ptr(),
        DTYPES[logits.dtype], outer, inner, vocab, outer_stride, inner_stride, labels.data_ptr(), labels_outer,
        labels_inner, lse.data_ptr(), entropy.data_ptr() if dentropy is not None else None, temperature, softcap,
        ignore_index, dlogits.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_LABEL:
            checks.labels_values(op, labels, vocab, ignore_index)
        refuse(op, status)
    return dlogits


def kl_penalty_cpu(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    kl = new_like(logprobs)
    status = library().ppomax_kl_penalty_cpu(
        logprobs.data_ptr(), DTYPES[logprobs.dtype], ref_logprobs.data_ptr(), DTYPES[ref_logprobs.dtype],
        kl.numel(), ESTIMATORS[estimator], kl.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("kl_penalty", status)
    return kl


def kl_penalty_backward_cpu(dkl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    dlogprobs = new_like(logprobs)
    status = library().ppomax_kl_penalty_backward_cpu(
        dkl.data_ptr(), logprobs.data_ptr(), DTYPES[logprobs.dtype], ref_logprobs.data_ptr(),
        DTYPES[ref_logprobs.dtype], dlogprobs.numel(), ESTIMATORS[estimator], dlogprobs.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("kl_penalty", status)
    return dlogprobs


def token_rewards_cpu(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, kl_coef: float, estimator: str
) -> Tensor:
    tokens = logprobs.shape[0]
    rewards = new_like(logprobs)
    status = library().ppomax_token_rewards_cpu(
        scores.data_ptr(), DTYPES[scores.dtype], logprobs.data_ptr(), DTYPES[logprobs.dtype], ref_logprobs.data_ptr(),
        DTYPES[ref_logprobs.dtype], cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, tokens, kl_coef,
        ESTIMATORS[estimator], rewards.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_SEQLENS:
            checks.cu_seqlens_values("token_rewards", cu_seqlens, tokens)
        refuse("token_rewards", status)
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
    row, value_row = rewards.stride(), values.stride()
    mask_row = row if mask is None else mask.stride()
    tokens, padded = rewards.shape[-1], cu_seqlens is None
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    advantages, returns = new_like(rewards), new_like(rewards)
    status = library().ppomax_gae_cpu(
        rewards.data_ptr(), DTYPES[rewards.dtype], row[0] if padded else 0,
        values.data_ptr(), DTYPES[values.dtype], value_row[0] if padded else 0,
        at(mask), mask_row[0] if padded else 0,
        at(cu_seqlens), sequences, tokens, gamma, lam, *array(lams), *array(bootstrap),
        advantages.data_ptr(), returns.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_SEQLENS and cu_seqlens is not None:
            checks.cu_seqlens_values("gae", cu_seqlens, tokens)
        refuse("gae", status)
    return advantages, returns


def moments_cpu(x: Tensor, mask: Tensor | None) -> Tensor:
    moments = empty(3, dtype=torch.float64)
    status = library().ppomax_moments_cpu(*array(x), at(mask), x.numel(), moments.data_ptr(), get_num_threads())
    if status:
        refuse("whiten", status)
    return moments


def whiten_cpu(x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, eps: float) -> Tensor:
    y = new_like(x)
    status = library().ppomax_whiten_cpu(
        *array(x), at(mask), y.numel(), moments.data_ptr(), shift_mean, eps, y.data_ptr(), get_num_threads()
    )
    if status:
        refuse("whiten", status)
    return y


def ppo_loss_cpu(
    logprobs: Tensor, tokens: PolicyTokens, entropy: Tensor | None, terms: PpoTerms, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old_logprobs, advantages, mask, is_weights, ref_logprobs = tokens
    normalizer, norm_value, clip_low, clip_high, dual_clip, kl_coef, estimator, ent_coef = terms
    loss, scale, metrics = empty((), dtype=float32), empty((), dtype=float32), empty(POLICY, dtype=float32)
    dlogprobs = new_like(logprobs) if need_grad else empty(0, dtype=float32)
    status = library().ppomax_ppo_loss_cpu(
        *array(logprobs), *array(old_logprobs), *array(advantages), at(mask), *array(is_weights),
        *array(ref_logprobs), *array(entropy), logprobs.numel(), at(normalizer), norm_value, clip_low, clip_high,
        dual_clip, kl_coef, ESTIMATORS[estimator], ent_coef, loss.data_ptr(), metrics.data_ptr(),
        dlogprobs.data_ptr() if need_grad else None, scale.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("ppo_loss", status)
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
    loss, scale, metrics = empty((), dtype=float32), empty((), dtype=float32), empty(VALUE, dtype=float32)
    dvalues = new_like(values) if need_grad else empty(0, dtype=float32)
    status = library().ppomax_value_loss_cpu(
        *array(values), *array(old_values), *array(returns), at(mask), values.numel(), at(normalizer),
        norm_value, clip, loss.data_ptr(), metrics.data_ptr(), dvalues.data_ptr() if need_grad else None,
        scale.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        refuse("value_loss", status)
    return loss, metrics, dvalues, scale


def sample_cpu(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    token = empty(rows, dtype=torch.int64)
    logprob, plain_logprob, entropy = empty(rows, dtype=float32), empty(rows, dtype=float32), empty(rows, dtype=float32)
    status = library().ppomax_sample_cpu(
        *array(logits), rows, vocab, logits.stride()[0], seeds.data_ptr(), positions.data_ptr(), temperature, top_k,
        top_p, token.data_ptr(), logprob.data_ptr(), plain_logprob.data_ptr(), entropy.data_ptr(), get_num_threads(),
    )  # fmt: skip
    if status:
        if status == BAD_LOGITS:
            row = int((token < 0).nonzero()[0])
            raise ValueError(
                f"sample: row {row} of logits holds NaN or +inf, or nothing above -inf; no token can be drawn from it"
            )
        refuse("sample", status)
    return token, logprob, plain_logprob, entropy
