"""One PPO-max update, in reading order.

    for each epoch, for each minibatch:
        policy:  sum_t max(-A*w, -A*clip(w)) / N  - ent_coef*H + kl_loss       N: response tokens of the global
        minibatch
        ptx:     + coef * sum_t NLL / M                                        M: target tokens of the global text batch
        critic:  vf_coef * 1/2 sum_t max((V-G)^2, (clip(V)-G)^2) / N
        one clipped optimiser step each, or none if a loss or gradient is not finite
Every mean is divided by a global count before the backward, so micro-batches and ranks only add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import ppomax_kernels as K
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.batch import Experience, Minibatch, Plan, minibatch, pack, plan_minibatches
from ppomax.config import TrainConfig
from ppomax.data import Text
from ppomax.models import Critic, head_of
from ppomax.scoring import scaled, state_hidden, state_values
from ppomax.sharding import Trained, total

TextSource = Callable[[int], list[Text]]
"""n -> the next n texts of the ptx term."""


class Diverged(RuntimeError):
    """Too many optimiser steps in a row had a NaN or infinite loss or gradient."""


@dataclass
class Health:
    """Counts of optimiser steps that were skipped because a loss or gradient was not finite."""

    skipped: int = 0
    """Over the whole run."""
    in_a_row: int = 0
    """Since the last good step."""

    def note(self, good: bool, limit: int) -> None:
        """Count one optimiser step; Diverged once `limit` in a row were bad."""
        self.in_a_row = 0 if good else self.in_a_row + 1
        self.skipped += not good
        if self.in_a_row >= limit:
            raise Diverged(
                f"{self.in_a_row} optimiser steps in a row had a NaN or infinite loss or gradient and were skipped; "
                "the weights are those of the last good step. Lower the learning rates, or look at the rewards"
            )


@dataclass
class Tally:
    """Metrics of an update: means over minibatches, except the largest ratio and what only the first minibatch
    shows."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        good = [r for r in self.rows if r["val/skipped"] == 0] or self.rows
        out = {key: sum(r[key] for r in good) / len(good) for key in good[0]}
        out["val/ratio_max"] = max(r["val/ratio_max"] for r in good)
        out["val/skipped"] = sum(r["val/skipped"] for r in self.rows)
        first = self.rows[0]
        out["val/first_ratio_gap"], out["val/first_value_gap"] = (
            first["val/first_ratio_gap"],
            first["val/first_value_gap"],
        )
        return out


def update(
    policy: Trained[PreTrainedModel],
    critic: Trained[Critic],
    experience: Experience,
    config: TrainConfig,
    health: Health,
    *,
    generator: torch.Generator | None = None,
    texts: TextSource | None = None,
) -> dict[str, float]:
    """PPO epochs over one buffer; trains both models in place and returns metrics under TRL's names.

    `generator` shuffles the epochs after the first, which keeps the rollout's plan. `texts` feeds the ptx term if its
    coefficient is above 0."""
    lengths = experience.rollout.cu_seqlens.diff().cpu()
    tally = Tally()
    for epoch in range(config.batch.epochs):
        plan: Plan = experience.rollout.plan
        if epoch:
            plan = plan_minibatches(lengths, config.batch.minibatch_size, config.batch.micro_tokens, generator)
        for micros in plan:
            row = train_minibatch(policy, critic, [minibatch(experience, m) for m in micros], config, health, texts)
            tally.rows.append(row)
    return tally.means()


def train_minibatch(
    policy: Trained[PreTrainedModel],
    critic: Trained[Critic],
    micros: list[Minibatch],
    config: TrainConfig,
    health: Health,
    texts: TextSource | None,
) -> dict[str, float]:
    """One optimiser step of each model on the sequences of `micros`."""
    device = micros[0].tokens.device
    tokens = total(torch.tensor(float(sum(len(m.labels) for m in micros)), device=device))
    parts = []
    for micro in micros:
        pg_loss, pg = policy_loss(policy, micro, tokens, config)
        policy.backward(pg_loss)
        v_loss, v, value_gap = critic_loss(critic, micro, tokens, config)
        critic.backward(v_loss)
        parts.append((pg_loss.detach(), v_loss.detach(), pg.tensor, v.tensor, value_gap))
    ptx = ptx_backward(policy, config, texts, device) if config.ptx.coef and texts else torch.zeros((), device=device)

    policy_norm, critic_norm = policy.grad_norm(), critic.grad_norm()
    losses = total(torch.stack([p[0] for p in parts]).sum() + torch.stack([p[1] for p in parts]).sum() + ptx)
    good = bool(torch.isfinite(losses + policy_norm + critic_norm))
    rates = policy.lr, critic.lr
    if good:
        policy.step(policy_norm)
        critic.step(critic_norm)
    else:
        policy.skip()
        critic.skip()
    health.note(good, config.run.max_bad_steps)
    return _row(parts, pg.names, v.names, ptx, policy_norm, critic_norm, rates, good)


def policy_loss(
    policy: Trained[PreTrainedModel], micro: Minibatch, tokens: Tensor, config: TrainConfig
) -> tuple[Tensor, K.Metrics]:
    """This micro-batch's share of the clipped surrogate, with entropy bonus and KL term; divided by the global
    `tokens`."""
    loss, kl = config.loss, config.kl
    head = head_of(policy.module)
    hidden, bias = scaled(state_hidden(policy.module, micro.tokens, micro.cu_seqlens, micro.states), head)
    weights = None
    if loss.sampler_is_cap is not None:
        weights = (micro.old_logprobs - micro.sampler_logprobs).exp().clamp(max=loss.sampler_is_cap)
    return K.linear_ppo_loss(
        hidden,
        head.weight,
        micro.labels,
        micro.old_logprobs,
        micro.advantages,
        bias=bias,
        temperature=config.rollout.temperature,
        softcap=head.softcap,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
        normalizer=tokens,
        is_weights=weights,
        ent_coef=loss.ent_coef,
        ref_logprobs=micro.ref_logprobs if kl.loss_coef else None,
        kl_coef=kl.loss_coef,
        estimator=kl.loss_estimator,
        impl=config.impl,
    )


def critic_loss(
    critic: Trained[Critic], micro: Minibatch, tokens: Tensor, config: TrainConfig
) -> tuple[Tensor, K.Metrics, Tensor]:
    """This micro-batch's share of the clipped value loss times vf_coef, and max |V - V_old| (0 before the first
    step)."""
    values = state_values(critic.module, micro.tokens, micro.cu_seqlens, micro.states)
    v_loss, metrics = K.value_loss(
        values, micro.old_values, micro.returns, clip=config.loss.value_clip, normalizer=tokens, impl=config.impl
    )
    return config.loss.vf_coef * v_loss, metrics, (values.detach() - micro.old_values).abs().max()


def ptx_backward(
    policy: Trained[PreTrainedModel], config: TrainConfig, texts: TextSource, device: torch.device
) -> Tensor:
    """Add the gradient of coef * mean NLL of the next texts, micro-batch by micro-batch; returns that loss."""
    rows = [Text(t.tokens[: config.ptx.max_tokens], t.loss_from) for t in texts(config.ptx.batch_size)]
    targets = total(torch.tensor(float(sum(max(0, len(t.tokens) - t.loss_from) for t in rows)), device=device))
    loss, head = torch.zeros((), device=device), head_of(policy.module)
    plan = plan_minibatches(torch.tensor([len(t.tokens) for t in rows]), len(rows), config.batch.micro_tokens, None)
    for micro in plan[0]:
        part = [rows[i] for i in micro.tolist()]
        tokens, cu = pack([t.tokens for t in part], device)
        states = [s + i - 1 for t, s in zip(part, cu.tolist(), strict=False) for i in range(t.loss_from, len(t.tokens))]
        at = torch.tensor(states, device=device)
        hidden, bias = scaled(state_hidden(policy.module, tokens, cu, at), head)
        nll, _ = K.linear_nll(
            hidden, head.weight, tokens[at + 1], bias=bias, softcap=head.softcap, normalizer=targets, impl=config.impl
        )
        policy.backward(config.ptx.coef * nll)
        loss += config.ptx.coef * nll.detach()
    return loss


def _row(
    parts: Sequence[tuple[Tensor, ...]],
    pg_names: tuple[str, ...],
    v_names: tuple[str, ...],
    ptx: Tensor,
    policy_norm: Tensor,
    critic_norm: Tensor,
    rates: tuple[float, float],
    good: bool,
) -> dict[str, float]:
    """Metrics of one minibatch, read back from the device once: sums of shares are means, except the largest ratio."""
    pg = dict(zip(pg_names, torch.stack([p[2] for p in parts]).sum(0).tolist(), strict=True))
    v = dict(zip(v_names, torch.stack([p[3] for p in parts]).sum(0).tolist(), strict=True))
    ratio_max = max(float(p[2][pg_names.index("ratio_max")]) for p in parts)
    return {
        "loss/policy_avg": pg["pg_loss"],
        "loss/value_avg": v["v_loss"],
        "loss/ptx_avg": float(ptx),
        "policy/approxkl_avg": pg["approx_kl"],
        "policy/clipfrac_avg": pg["clipfrac"],
        "policy/dual_clipfrac_avg": pg["dual_clipfrac"],
        "val/clipfrac_avg": v["clipfrac"],
        "val/ratio": pg["ratio_mean"],
        "val/ratio_max": ratio_max,
        "val/first_ratio_gap": abs(ratio_max - 1.0),
        "val/first_value_gap": max(float(p[4]) for p in parts),
        "policy/grad_norm": float(policy_norm),
        "critic/grad_norm": float(critic_norm),
        "lr": rates[0],
        "critic/lr": rates[1],
        "val/skipped": float(not good),
    }
