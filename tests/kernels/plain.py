"""The yardstick: each op as a careful user writes it in eager torch, with float32 arithmetic. Only its rounding error
is used: what is right is settled by the oracle alone."""

from typing import Any

import torch
from torch import Tensor


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = logits.float()
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def token_logprobs(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The yardstick of the results: log_softmax takes the maximum off first, so a common offset of the logits costs
    nothing."""
    keep = labels != ignore_index
    logp = torch.log_softmax(_scaled(logits, temperature, softcap), -1)
    picked = logp.gather(-1, labels.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
    return picked.where(keep, 0.0), -(logp.exp() * logp).sum(-1).where(keep, 0.0)


def token_logprobs_by_lse(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, softcap: float | None = None, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The yardstick of the gradient, which is made from the saved logsumexp: a float32 one carries the rounding of
    the logits' offset into p."""
    keep = labels != ignore_index
    z = _scaled(logits, temperature, softcap)
    lse = torch.logsumexp(z, -1)
    picked = z.gather(-1, labels.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
    return (picked - lse).where(keep, 0.0), (lse - (torch.exp(z - lse[..., None]) * z).sum(-1)).where(keep, 0.0)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    u = logprobs.float() - ref_logprobs.float()
    if estimator == "k3":
        u = u.clamp(-20, 20)
        return torch.exp(-u) - 1 + u
    return {"k1": u, "k2": u * u / 2, "abs": u.abs()}[estimator]


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, kl_coef: float, estimator: str
) -> Tensor:
    rewards = -kl_coef * kl_penalty(logprobs, ref_logprobs, estimator)
    rewards[cu_seqlens[1:].long() - 1] += scores.float()
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: Tensor, bootstrap: Tensor
) -> tuple[Tensor, Tensor]:
    """The loop over time of the trainers, on padded (B, T)."""
    advantages, next_value, carried = [], bootstrap.float(), torch.zeros_like(bootstrap.float())
    keep = mask.bool()
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(keep[:, t], delta + gamma * lam * carried, carried)
        next_value = torch.where(keep[:, t], values[:, t], next_value)
        advantages.append(carried)
    a = torch.stack(advantages[::-1], 1).where(keep, 0.0)
    return a, (a + values).where(keep, 0.0)


def whiten(x: Tensor, mask: Tensor | None, shift_mean: bool, eps: float, of: Tensor | None = None) -> Tensor:
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    kept = x[keep].float() if of is None else of.float()
    if not kept.numel():
        return torch.zeros_like(x, dtype=torch.float32)
    mean = kept.mean()
    y = (x.float() - mean) * torch.rsqrt(kept.var(correction=0) + eps)
    return (y if shift_mean else y + mean).where(keep, 0.0)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    normalizer: float | None,
    is_weights: Tensor | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    estimator: str,
    entropy: Tensor | None,
    ent_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask.bool()
    total = float(keep.sum()) if normalizer is None else normalizer

    def mean(x: Any) -> Tensor:
        return x.float()[keep].sum() / total if total > 0 else x.float()[keep].sum() * 0.0

    a = advantages.float()
    log_w = (logprobs.float() - old_logprobs.float()).clamp(-20, 20)
    w = log_w.exp()
    first, second = -a * w, -a * w.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(first, second)
    dual = torch.zeros_like(keep)
    if dual_clip is not None:
        dual = (a < 0) & (loss > -a * dual_clip)
        loss = torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)
    loss = loss if is_weights is None else loss * is_weights.float()
    zero = torch.zeros_like(w)
    kl = zero if ref_logprobs is None else kl_penalty(logprobs, ref_logprobs, estimator)
    ent = zero if entropy is None else entropy
    metrics = {
        "pg_loss": mean(loss),
        "approx_kl": mean(w - 1 - log_w),
        "clipfrac": mean(second > first),
        "dual_clipfrac": mean(dual),
        "ratio_mean": mean(w),
        "ratio_max": w[keep].max() if bool(keep.any()) else zero.sum(),
        "kl": mean(kl),
        "entropy": mean(ent),
        "tokens": keep.sum().float(),
        "ratio_gap": (w - 1).abs()[keep].max() if bool(keep.any()) else zero.sum(),
    }
    return metrics["pg_loss"] + kl_coef * metrics["kl"] - ent_coef * metrics["entropy"], metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    *,
    clip: float | None,
    normalizer: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    total = float(keep.sum()) if normalizer is None else normalizer

    def mean(x: Any) -> Tensor:
        return x.float()[keep].sum() / total if total > 0 else x.float()[keep].sum() * 0.0

    v, old, target = values.float(), old_values.float(), returns.float()
    first = (v - target) ** 2
    second = first if clip is None else (old + (v - old).clamp(-clip, clip) - target) ** 2
    moved = torch.zeros_like(keep) if clip is None else (v - old).abs() > clip
    metrics = {
        "v_loss": 0.5 * mean(torch.maximum(first, second)),
        "clipfrac": mean(moved & (second > first)),
        "value_mean": mean(v),
        "return_mean": mean(target),
        "squared_error": mean(first),
        "tokens": keep.sum().float(),
    }
    return metrics["v_loss"], metrics
