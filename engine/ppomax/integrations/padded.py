"""The padded conventions of verl and OpenRLHF on our ops: (B, T) tensors, a response mask, losses aggregated over the
global batch, under verl's names.

What each mode divides by, and the weight of a token, with S sequences that have tokens, T_s of them in sequence s:
    token-mean            1 / all tokens                 token-sum               1
    seq-mean-token-sum    1 / S                          seq-mean-token-mean     1 / (T_s S)
    seq-mean-token-sum-norm   1 / (S * loss_scale_factor), or the padded length T in place of the factor
each times dp_size, since FSDP takes the mean over ranks. Needs torch and ppomax_kernels alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import ppomax_kernels as K
import torch
from torch import Tensor

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


class Clip(NamedTuple):
    """verl's clip_ratio_low, clip_ratio_high and clip_ratio_c (None: no dual clip)."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = 3.0


class Aggregation(NamedTuple):
    """How a token's loss enters the batch's; the last four as in verl's `config.global_batch_info`."""

    mode: str = "token-mean"
    dp_size: int = 1
    batch_num_tokens: int | Tensor | None = None
    global_batch_size: int | Tensor | None = None
    loss_scale_factor: int | None = None


def clipped_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip: Clip,
    over: Aggregation,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`compute_policy_loss_vanilla` of verl in one pass: the 0-d loss, differentiable through log_prob, and 0-d
    `pg_clipfrac`, `pg_clipfrac_lower`, `ppo_kl`, means over this batch's response tokens, without a host sync.

    Tensors (B, T); response_mask nonzero on response tokens, bool or numbers. Tensors that are not contiguous are
    copied. ValueError: another mode, or a global count that dp_size > 1 needs is missing."""
    mask = response_mask.bool()
    share, per_token = divisor_and_weights(mask, over)
    weights = [w.detach().float().expand(mask.shape) for w in (rollout_is_weights, per_token) if w is not None]
    loss, metrics = K.ppo_loss(
        log_prob.contiguous(),
        old_log_prob.detach().contiguous(),
        advantages.detach().contiguous(),
        mask.contiguous(),
        clip_low=clip.low,
        clip_high=clip.high,
        dual_clip=clip.dual,
        normalizer=share,
        is_weights=torch.stack(weights).prod(0) if weights else None,
    )
    # The figures are divided as the loss is; verl's are means over the batch's own tokens.
    mean = share / metrics["tokens"].clamp(min=1e-8)
    found = {"pg_clipfrac": metrics["clipfrac"] * mean, "pg_clipfrac_lower": metrics["dual_clipfrac"] * mean}
    # mean -log w, from mean (w - 1) - log w and mean w
    found["ppo_kl"] = (metrics["approx_kl"] - metrics["ratio_mean"]) * mean + metrics["tokens"].clamp(max=1)
    return loss, found


def divisor_and_weights(mask: Tensor, over: Aggregation) -> tuple[Tensor, Tensor | None]:
    """What sums are divided by, 0-d float32, and each token's weight, (B, T) or None for 1."""
    if over.mode not in MODES:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(MODES)}, got {over.mode!r}")
    by_token = over.mode == "token-mean"
    count = over.batch_num_tokens if by_token else over.global_batch_size
    if over.mode == "token-sum":
        count = 1
    elif count is None and over.dp_size > 1:
        name = "batch_num_tokens" if by_token else "global_batch_size"
        raise ValueError(f"{name} is needed when dp_size > 1: this rank knows its own part of the batch alone")
    elif count is None:
        count = mask.sum() if by_token else mask.any(-1).sum()
    share = torch.as_tensor(count, device=mask.device).float() / over.dp_size
    if over.mode == "seq-mean-token-sum-norm":
        share = share * (over.loss_scale_factor or mask.shape[-1])
    if over.mode != "seq-mean-token-mean":
        return share, None
    return share, (1.0 / (mask.sum(-1, keepdim=True) + 1e-8)).expand(mask.shape)


def whitened_gae(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
) -> tuple[Tensor, Tensor]:
    """`compute_gae_advantage_return` of verl: GAE that steps over tokens outside the mask, and advantages whitened by
    the unbiased variance over it; (B, T) each.

    By design otherwise: where the mask is off both results are 0; verl leaves whitened carry-over there, which no loss
    reads."""
    mask = response_mask.bool().contiguous()
    rewards, values = token_level_rewards.detach().contiguous(), values.detach().contiguous()
    advantages, returns = K.gae(rewards, values, mask=mask, gamma=float(gamma), lam=float(lam))
    count = mask.sum()
    unbiased = ((count - 1).clamp(min=0) / count.clamp(min=1)).sqrt()
    return K.whiten(advantages, mask) * unbiased, returns
