"""One PPO-max update, in reading order.

    for each epoch, for each minibatch:
        policy:  sum_t max(-A*w, -A*clip(w)) / N  - ent_coef*H + kl_loss       N: response tokens of the global
        minibatch
        ptx:     + coef * sum_t NLL / M                                        M: target tokens of the global text batch
        critic:  vf_coef * 1/2 sum_t max((V-G)^2, (clip(V)-G)^2) / N
        one clipped optimiser step each, or none if a loss or gradient is not finite
Every mean is divided by a global count before the backward, so micro-batches and ranks only add up."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ppomax_kernels as K
import torch
from ppomax_kernels.ppo_loss import MAXIMA
from ppomax_kernels.ppo_loss import METRICS as PG_METRICS
from ppomax_kernels.value_loss import METRICS as V_METRICS
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.config import TrainConfig
from ppomax.data import Text
from ppomax.models import any_pads, head_of
from ppomax.models.adapter_critic import AnyCritic
from ppomax.models.fused_trunk import fused_trunk
from ppomax.models.transfers import sent, upload
from ppomax.recipe.batch import (
    Experience,
    MicroBatches,
    Minibatch,
    cumulative,
    minibatch,
    pack,
    split_minibatches,
    with_stand_in,
)
from ppomax.recipe.cut import cut_ppo_loss
from ppomax.recipe.rewards import whitened_and_clipped
from ppomax.recipe.scoring import state_hidden, state_values
from ppomax.sharding import Trained, ranks

log = logging.getLogger(__name__)

NextTexts = Callable[[int], list[Text]]
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
        if not good:
            log.warning(
                "an optimiser step had a NaN or infinite loss or gradient and was skipped (%d so far)", self.skipped
            )
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

    def kl_of_last(self, count: int) -> float:
        """Mean KL to the policy that made the buffer, over the last `count` minibatches."""
        return sum(r["policy/approxkl_avg"] for r in self.rows[-count:]) / count

    def means(self) -> dict[str, float]:
        good = [r for r in self.rows if r["val/skipped"] == 0] or self.rows
        out = {key: sum(r[key] for r in good) / len(good) for key in good[0]}
        out["val/ratio_max"] = max(r["val/ratio_max"] for r in good)
        out["val/skipped"] = sum(r["val/skipped"] for r in self.rows)
        return out | {key: self.rows[0][key] for key in ("val/first_ratio_gap", "val/first_value_gap")}


def update(
    policy: Trained[PreTrainedModel],
    critic: Trained[AnyCritic],
    experience: Experience,
    config: TrainConfig,
    health: Health,
    *,
    generator: torch.Generator | None = None,
    texts: NextTexts | None = None,
) -> dict[str, float]:
    """PPO epochs over one buffer; trains both models in place and returns metrics under TRL's names.

    `generator` shuffles the epochs after the first, which keeps the rollout's plan. `texts` feeds the ptx term if its
    coefficient is above 0."""
    tally, padded = Tally(), any_pads(policy, critic)
    with fused_trunk(policy, critic, impl=config.impl):
        for epoch in range(config.batch.epochs):
            minibatches: MicroBatches = experience.rollout.micro_batches
            if epoch:
                minibatches = experience.rollout.another_pass(config.batch, generator, padded=padded)
            for micros in minibatches:
                parts = prepared([minibatch(experience, m) for m in micros], config)
                tally.rows.append(train_minibatch(policy, critic, parts, config, health, texts))
            if config.batch.kl_stop is not None and tally.kl_of_last(len(minibatches)) > config.batch.kl_stop:
                break
    return tally.means() | {"val/epochs": float(epoch + 1)}


def prepared(micros: list[Minibatch], config: TrainConfig) -> list[Minibatch]:
    """One minibatch with what the whole of it decides, on all ranks: advantages whitened and clipped by its own mean
    and std, and on which side of an entropy target it lies."""
    real = [m for m in micros if m.weight]
    if config.advantage.over == "minibatch":
        own = torch.cat([m.advantages for m in real] or [micros[0].advantages[:0]])
        found = whitened_and_clipped(own, config.advantage, config.impl, ranks.group())
        cut = iter(found.split([len(m.labels) for m in real]))
        micros = [replace(m, advantages=next(cut) if m.weight else torch.zeros_like(m.advantages)) for m in micros]
    if config.loss.ent_target is not None:
        entropy = torch.cat([m.entropy for m in real] or [micros[0].entropy[:0]])
        total, count = ranks.sum(torch.stack([entropy.sum(), torch.ones_like(entropy).sum()])).tolist()
        # d(coef * |H - target|) is d(-ent_coef * H) with the coefficient's sign turned while H is too large.
        coef = config.loss.ent_coef * (1.0 if total / count < config.loss.ent_target else -1.0)
        micros = [replace(m, ent_coef=coef) for m in micros]
    return micros


class MicroLosses(NamedTuple):
    """What one micro-batch adds to its minibatch: shares of losses and metrics, 0 for a stand-in."""

    pg_loss: Tensor
    v_loss: Tensor
    pg_metrics: Tensor
    """By the names of ppo_loss.METRICS."""
    v_metrics: Tensor
    """By the names of value_loss.METRICS."""
    value_gap: Tensor
    """max |V - V_old|."""


class OptimizerStep(NamedTuple):
    """One step of both optimisers, or a skipped one."""

    policy_norm: Tensor
    critic_norm: Tensor
    policy_lr: float
    critic_lr: float
    good: bool
    """False: a loss or gradient was not finite, and no weight moved."""


def train_minibatch(
    policy: Trained[PreTrainedModel],
    critic: Trained[AnyCritic],
    micros: list[Minibatch],
    config: TrainConfig,
    health: Health,
    texts: NextTexts | None,
) -> dict[str, float]:
    """One optimiser step of each model on the sequences of `micros`, which are this rank's of the minibatch."""
    device = micros[0].tokens.device
    tokens = ranks.sum(torch.tensor(float(sum(len(m.labels) for m in micros if m.weight)), device=device))
    with_ptx = bool(config.ptx.coef and texts)
    parts = []
    for i, micro in enumerate(micros):
        last = i + 1 == len(micros)
        weight = micro.weight
        pg_loss, pg_metrics = policy_loss(policy, micro, tokens, config)
        policy.backward(weight * pg_loss, last=last and not with_ptx)
        v_loss, v_metrics, value_gap = critic_loss(critic, micro, tokens, config)
        critic.backward(weight * v_loss, last=last)
        given = (pg_loss, v_loss, pg_metrics.tensor, v_metrics.tensor, value_gap)
        parts.append(MicroLosses(*(weight * x.detach() for x in given)))
    ptx = ptx_backward(policy, config, texts, device) if with_ptx and texts else torch.zeros((), device=device)
    losses = ranks.sum(
        torch.stack([p.pg_loss for p in parts]).sum() + torch.stack([p.v_loss for p in parts]).sum() + ptx
    )
    stepped = _step(policy, critic, losses, config.loss.joint_grad_clip)
    health.note(stepped.good, config.run.max_bad_steps)
    return _row(parts, ranks.sum(ptx), stepped)


def _step(policy: Trained[PreTrainedModel], critic: Trained[AnyCritic], losses: Tensor, joint: bool) -> OptimizerStep:
    """Step both optimisers if all losses and gradients are finite, on every rank alike; `joint`: clipped by the norm
    of both gradients together."""
    norms, rates = (policy.grad_norm(), critic.grad_norm()), (policy.lr, critic.lr)
    good = bool(torch.isfinite(losses + norms[0] + norms[1]))
    both: tuple[Trained[Any], ...] = (policy, critic)
    for part, norm in zip(both, norms, strict=True):
        if good:
            part.step(torch.stack(norms).norm() if joint else norm)
        else:
            part.skip()
    return OptimizerStep(*norms, *rates, good)


def policy_loss(
    policy: Trained[PreTrainedModel], micro: Minibatch, tokens: Tensor, config: TrainConfig
) -> tuple[Tensor, K.Metrics]:
    """This micro-batch's share of the clipped surrogate, with entropy bonus and KL term; divided by the global
    `tokens`."""
    pg_loss, figures = policy.call(_surrogate, micro, tokens, config)
    return pg_loss, K.Metrics(PG_METRICS, figures)


def _surrogate(policy: PreTrainedModel, micro: Minibatch, tokens: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    loss, kl = config.loss, config.kl
    head = head_of(policy)
    hidden = state_hidden(policy, micro.tokens, micro.cu_seqlens, micro.states, micro.trunk)
    old = micro.ref_logprobs if loss.ratio_to == "reference" else micro.old_logprobs
    weights = None
    if loss.sampler_is_cap is not None:
        weights = (micro.old_logprobs - micro.sampler_logprobs).exp().clamp(max=loss.sampler_is_cap)
    per_token: dict[str, Any] = {
        "old_logprobs": old,
        "advantages": micro.advantages,
        "is_weights": weights,
        "ref_logprobs": micro.ref_logprobs if kl.loss_coef else None,
    }
    terms: dict[str, Any] = {
        "clip_low": 1.0 if loss.clip_low is None else loss.clip_low,
        "clip_high": math.inf if loss.clip_high is None else loss.clip_high,
        "dual_clip": loss.dual_clip,
        "normalizer": tokens,
        "ent_coef": loss.ent_coef if micro.ent_coef is None else micro.ent_coef,
        "kl_coef": kl.loss_coef,
        "estimator": kl.loss_estimator,
        "impl": config.impl,
    }
    temperature = config.rollout.temperature
    if micro.kept is not None:
        cut = cut_ppo_loss(hidden, head, micro.labels, per_token, micro.kept, temperature=temperature, **terms)
        return cut[0], cut[1].tensor
    hidden, bias = head.scaled(hidden)
    how: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": head.softcap, "kept": len(micro.labels)}
    pg_loss, figures = K.linear_ppo_loss(hidden, head.weight, micro.labels, **per_token, **terms, **how)
    return pg_loss, figures.tensor


def critic_loss(
    critic: Trained[AnyCritic], micro: Minibatch, tokens: Tensor, config: TrainConfig
) -> tuple[Tensor, K.Metrics, Tensor]:
    """This micro-batch's share of the clipped value loss times vf_coef, and max |V - V_old| (0 before the first
    step)."""
    values = critic.call(state_values, micro.tokens, micro.cu_seqlens, micro.states, micro.trunk)
    v_loss, metrics = K.value_loss(
        values, micro.old_values, micro.returns, clip=config.loss.value_clip, normalizer=tokens, impl=config.impl
    )
    return config.loss.vf_coef * v_loss, metrics, (values.detach() - micro.old_values).abs().max()


def ptx_backward(
    policy: Trained[PreTrainedModel], config: TrainConfig, texts: NextTexts, device: torch.device
) -> Tensor:
    """Add the gradient of coef * mean NLL of the next texts (the same on all ranks, each works on some),
    micro-batch by micro-batch; returns this rank's share of that loss."""
    rows = [Text(t.tokens[: config.ptx.max_tokens], t.loss_from) for t in texts(config.ptx.batch_size)]
    targets = torch.tensor(float(sum(max(0, len(t.tokens) - t.loss_from) for t in rows)), device=device)
    loss, lengths = torch.zeros((), device=device), torch.tensor([len(t.tokens) for t in rows])
    budget, padded = config.batch.micro_tokens, any_pads(policy)
    micros = split_minibatches(lengths, len(rows), budget, None, ranks.position(), padded=padded)[0]
    for i, micro in enumerate(micros):
        part = [rows[i] for i in with_stand_in(micro, cumulative(lengths)).tolist()]
        tokens, cu = pack([t.tokens for t in part])
        states = [s + i - 1 for t, s in zip(part, cu.tolist(), strict=False) for i in range(t.loss_from, len(t.tokens))]
        share = config.ptx.coef * float(len(micro) > 0)
        nll = policy.call(_nll, sent(tokens, device), cu, upload(states, device), targets, config.impl)
        policy.backward(share * nll, last=i + 1 == len(micros))
        loss += share * nll.detach()
    return loss


def _nll(policy: PreTrainedModel, tokens: Tensor, cu: Tensor, at: Tensor, targets: Tensor, impl: str) -> Tensor:
    head = head_of(policy)
    hidden, bias = head.scaled(state_hidden(policy, tokens, cu, at))
    labels, cap = tokens[at + 1], head.softcap
    nll, _ = K.linear_nll(
        hidden, head.weight, labels, bias=bias, softcap=cap, normalizer=targets, kept=len(labels), impl=impl
    )
    return nll


def _row(parts: Sequence[MicroLosses], ptx: Tensor, stepped: OptimizerStep) -> dict[str, float]:
    """Metrics of one minibatch, read back from the device once: sums of shares are means, except the largest ratio."""
    shares = torch.stack([torch.cat([p.pg_metrics, p.pg_loss.view(1)]) for p in parts])
    *figures, optimised = ranks.sum(shares.sum(0)).tolist()
    pg = dict(zip(PG_METRICS, figures, strict=True))
    v = dict(zip(V_METRICS, ranks.sum(torch.stack([p.v_metrics for p in parts]).sum(0)).tolist(), strict=True))
    at = [PG_METRICS.index(name) for name in MAXIMA]
    most = torch.stack([torch.cat([p.pg_metrics[at], p.value_gap.view(1)]) for p in parts]).amax(0)
    ratio_max, ratio_gap, value_gap = ranks.max(most).tolist()
    return {
        "loss/policy_avg": pg["pg_loss"],
        "loss/policy_total": optimised,
        "loss/value_avg": v["v_loss"],
        "loss/ptx_avg": float(ptx),
        "policy/approxkl_avg": pg["approx_kl"],
        "policy/clipfrac_avg": pg["clipfrac"],
        "policy/dual_clipfrac_avg": pg["dual_clipfrac"],
        "val/clipfrac_avg": v["clipfrac"],
        "val/ratio": pg["ratio_mean"],
        "val/ratio_max": ratio_max,
        "val/first_ratio_gap": ratio_gap,
        "val/first_value_gap": value_gap,
        "policy/grad_norm": float(stepped.policy_norm),
        "critic/grad_norm": float(stepped.critic_norm),
        "lr": stepped.policy_lr,
        "critic/lr": stepped.critic_lr,
        "val/skipped": float(not stepped.good),
    }
