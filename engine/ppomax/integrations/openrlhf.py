"""OpenRLHF: its policy loss, value loss, advantages and log-probabilities on our ops, with its own signatures.

    from ppomax.integrations.openrlhf import install; install()         before its Ray actors start
puts them in the place of `PolicyLoss` and `ValueLoss` in openrlhf.trainer.ray, of
`RemoteExperienceMaker.get_advantages_and_returns`, and of `log_probs_from_logits` and `compute_entropy` in
openrlhf.models.actor; each can be used by itself as well, without OpenRLHF installed.
They equal its own (tests/integrations/test_openrlhf.py), but: `ppo_kl` is of log ratios clamped to +-20, as the loss
is; and `log_probs_from_logits` leaves the logits as they are, where OpenRLHF's divides them by a temperature in place.
Left to OpenRLHF, and refused here: gspo, gating by divergence, a value loss by sample. Known: OpenRLHF 0.11."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ppomax_kernels as K
import torch
from torch import Tensor, nn

from ppomax.integrations import check_signature
from ppomax.integrations.padded import Aggregation, Clip, clipped_policy_loss

POLICY_LOSS = ("self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs", "dp_size",
               "batch_num_tokens", "global_batch_size")  # fmt: skip
VALUE_LOSS = ("self", "values", "old_values", "returns", "action_mask", "dp_size", "batch_num_tokens",
              "global_batch_size")  # fmt: skip
ADVANTAGES = ("self", "values", "rewards", "action_mask", "gamma", "lambd")
LOGPROBS, ENTROPY = ("logits", "labels", "temperature"), ("logits",)


class PolicyLoss(nn.Module):
    """OpenRLHF's clipped loss: forward gives loss, clip ratio, KL, and of a correction for another sampler's
    probabilities the KL and the share of tokens (or sequences) outside of its band, else None twice."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, value, served in (
            ("policy_loss_type", policy_loss_type, ("ppo",)),
            ("is_correction_level", is_correction_level, ("off", "token", "seq")),
            ("is_correction_mode", is_correction_mode, ("mask", "clip")),
            ("is_correction_gating", is_correction_gating, ("ratio",)),
        ):
            if value not in served:
                raise ValueError(
                    f"{name} must be one of {', '.join(served)} here, got {value!r}; use OpenRLHF's own loss"
                )
        if is_correction_mode == "clip" and is_correction_level == "seq":
            raise ValueError("is_correction_mode=clip needs is_correction_level=token")
        self.clip = Clip(clip_eps_low, clip_eps_high, dual_clip)
        self.token_level_loss = token_level_loss
        self.level, self.mode, self.band = is_correction_level, is_correction_mode, tuple(is_correction_threshold)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(B, T) each; a mask of None counts every token."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        weights = vllm_kl = outside = None
        if self.level != "off":
            if rollout_log_probs is None:
                raise ValueError(f"is_correction_level={self.level} needs rollout_log_probs")
            weights, outside = self._correction(old_log_probs, rollout_log_probs, mask)
            vllm_kl = _mean(rollout_log_probs - old_log_probs, mask)
        over = _aggregation(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        loss, found = clipped_policy_loss(old_log_probs, log_probs, advantages, mask, self.clip, over, weights)
        return loss, found["pg_clipfrac"], found["ppo_kl"], vllm_kl, outside

    def _correction(self, old: Tensor, sampled: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's weight, and the share outside of the band: of tokens, or of sequences."""
        low, high = self.band
        log_ratio = (old - sampled).detach()
        by_sequence = self.level == "seq"
        stat = (_mean(log_ratio, mask, -1)[:, None] if by_sequence else log_ratio).exp()
        inside = (stat >= low) & (stat <= high)
        out = (~inside).float()
        share = out.mean() if by_sequence else _mean(out, mask)
        if self.mode == "clip":
            return stat.clamp(low, high), share
        return torch.where(inside, log_ratio.exp(), 0.0), share


class ValueLoss(nn.Module):
    """OpenRLHF's value loss, clipped by `clip_eps` around the old values, by token."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        if not token_level_loss:
            raise ValueError("token_level_loss=False is not served here; use OpenRLHF's own ValueLoss")
        self.clip_eps = clip_eps

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """(B, T) each -> the 0-d loss, differentiable through values."""
        share = None if batch_num_tokens is None else torch.as_tensor(batch_num_tokens, device=values.device) / dp_size
        loss, _ = K.value_loss(
            values.contiguous(),
            old_values.detach().contiguous(),
            returns.detach().contiguous(),
            None if action_mask is None else action_mask.bool().contiguous(),
            clip=self.clip_eps,
            normalizer=None if share is None else share.float(),
        )
        return loss


def advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """`RemoteExperienceMaker.get_advantages_and_returns`: what the mask leaves out counts as a step of reward 0 and
    value 0, which the walk does not step over (ppomax and verl do: K.gae with mask=)."""
    if action_mask is not None:
        values, rewards = action_mask * values, action_mask * rewards
    values, rewards = values.detach().contiguous(), rewards.detach().contiguous()
    return K.gae(rewards, values, gamma=float(gamma), lam=float(lambd))


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """logits (..., V), labels (...) -> the labels' log-probabilities (...) in float32, differentiable."""
    found = K.token_logprobs(logits.contiguous(), labels, temperature=temperature)
    assert isinstance(found, Tensor)
    return found


def compute_entropy(logits: Tensor) -> Tensor:
    """logits (..., V) -> the entropy of each row (...) in float32, nats, differentiable."""
    nothing = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return K.token_logprobs(logits.contiguous(), nothing, return_entropy=True)[1]


def install() -> None:
    """Put all in their places. IntegrationError: OpenRLHF's own take other parameters than ours stand in for."""
    try:
        named = f"openrlhf {version('openrlhf')}"
    except PackageNotFoundError:
        named = "this openrlhf"
    losses, maker = (
        importlib.import_module(f"openrlhf.{m}") for m in ("models.loss", "trainer.ppo_utils.experience_maker")
    )
    replace(losses, maker.RemoteExperienceMaker, named)
    replace_logprobs(importlib.import_module("openrlhf.models.actor"), named)
    for name in ("ppo_actor", "ppo_critic"):
        module = importlib.import_module(f"openrlhf.trainer.ray.{name}")
        for loss in (PolicyLoss, ValueLoss):
            if hasattr(module, loss.__name__):
                setattr(module, loss.__name__, loss)


def replace(losses: Any, maker: Any, named: str) -> None:
    """`install` for these two, given; signatures are looked at first."""
    check_signature(losses.PolicyLoss.forward, POLICY_LOSS, named)
    check_signature(losses.ValueLoss.forward, VALUE_LOSS, named)
    check_signature(maker.get_advantages_and_returns, ADVANTAGES, named)
    losses.PolicyLoss, losses.ValueLoss = PolicyLoss, ValueLoss
    maker.get_advantages_and_returns = lambda self, *given, **words: advantages_and_returns(*given, **words)


def replace_logprobs(actor: Any, named: str) -> None:
    """`install` for the module of the actor; signatures are looked at first."""
    check_signature(actor.log_probs_from_logits, LOGPROBS, named)
    check_signature(actor.compute_entropy, ENTROPY, named)
    actor.log_probs_from_logits, actor.compute_entropy = log_probs_from_logits, compute_entropy


def _aggregation(by_token: bool, dp_size: int, tokens: Any, samples: Any) -> Aggregation:
    """OpenRLHF scales by the ranks only what is divided by a count of all of them."""
    known = tokens is not None if by_token else samples is not None
    mode = "token-mean" if by_token else "seq-mean-token-mean"
    return Aggregation(mode, dp_size if known else 1, tokens, samples)


def _mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    return (x * mask).sum(dim) / mask.sum(dim)
