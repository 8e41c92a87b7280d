"""What a buffer tells about a run: one flat mapping under TRL's names where TRL has one.

Perplexity is exp(mean NLL of response tokens); it is not divided by length a second time. KL per token is k3, which
cannot be negative; TRL's `objective/kl` (k1, summed over a response) is kept beside it."""

from __future__ import annotations

from typing import NamedTuple

import ppomax_kernels as K
import torch
from torch import Tensor

from ppomax.recipe.batch import Experience, Rollout
from ppomax.recipe.rewards import sequence_sums


class GivenUp(Exception):
    """A step that ended before its update, as its caller wished."""


class StepResult(NamedTuple):
    """What one step of an engine gives."""

    metrics: dict[str, float]
    """By name; see recipe/measures.py and recipe/update.py."""
    scores: Tensor
    """(S,) float32 raw scores of the step's responses."""


QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99}


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """`1 - mean((returns - values)**2) / var(returns)`: 1 if they are equal, 0 for the returns' mean, less for a
    constant off it; 0 if the returns do not vary."""
    spread = returns.double().var(unbiased=False)
    return float(1 - (returns.double() - values.double()).pow(2).mean() / spread) if spread > 1e-12 else 0.0


def monte_carlo_returns(rewards: Tensor, roll: Rollout, gamma: float, impl: str = "auto") -> Tensor:
    """(N,) discounted sums of the rewards to come, whatever the critic says."""
    _, returns = K.gae(rewards, torch.zeros_like(rewards), roll.response_cu, gamma=gamma, lam=1.0, impl=impl)
    return returns


def distinct_n(responses: list[list[int]], n: int = 2) -> float:
    """Different n-grams over all n-grams of the responses; 1 if there are none."""
    grams = [tuple(r[i : i + n]) for r in responses for i in range(len(r) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def experience_metrics(experience: Experience, impl: str = "auto", gamma: float = 1.0) -> dict[str, float]:
    """Scores, KL, entropy, perplexity, lengths and diversity of one buffer; the critic is held against Monte-Carlo
    returns with this gamma."""
    roll, scores = experience.rollout, experience.scores
    u = roll.logprobs - roll.ref_logprobs
    kl = K.kl_penalty(roll.logprobs, roll.ref_logprobs, estimator="k3", impl=impl)
    earned = sequence_sums(experience.rewards, roll.response_cu)
    lengths = roll.lengths.float()
    out = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(unbiased=False),
        "objective/shaped_scores": experience.shaped_scores.mean(),
        "objective/kl": sequence_sums(u, roll.response_cu).mean(),
        "objective/kl_per_token": kl.mean(),
        "objective/entropy": sequence_sums(roll.entropy, roll.response_cu).mean(),
        "objective/non_score_reward": (earned - experience.shaped_scores).mean(),
        "objective/rlhf_reward": earned.mean(),
        "policy/entropy_avg": roll.entropy.mean(),
        "rollout/perplexity": (-roll.logprobs.mean()).exp(),
        "rollout/ref_perplexity": (-roll.ref_logprobs.mean()).exp(),
        "rollout/length": lengths.mean(),
        "rollout/length_max": lengths.max(),
        "rollout/truncated": (~roll.finished).float().mean(),
        "rollout/logprob_gap": (roll.logprobs - roll.sampler_logprobs).abs().max(),
        "rollout/logprob_gap_mean": (roll.logprobs - roll.sampler_logprobs).abs().mean(),
        "val/num_eos_tokens": roll.finished.float().sum(),
        "critic/values": roll.values.mean(),
        "critic/returns": experience.returns.mean(),
        "policy/advantages": experience.advantages.mean(),
        "policy/advantages_std": experience.advantages.std(unbiased=False),
    }
    if roll.kl is not None:
        out["objective/kl_vocabulary"] = roll.kl.mean()
    if roll.untempered is not None:
        own, ref = roll.untempered
        # Of tokens drawn at another temperature; their weights make the mean one under temperature 1 again.
        k3 = K.kl_penalty(own, ref, estimator="k3", impl=impl)
        out["objective/kl_per_token_untempered"] = ((own - roll.logprobs).exp() * k3).mean()
        out["rollout/perplexity_untempered"] = (-own.mean()).exp()
    out |= {f"objective/scores/{name}": x.mean() for name, x in experience.score_parts.items()}
    quantiles = torch.quantile(scores, torch.tensor(list(QUANTILES.values()), device=scores.device))
    out.update({f"objective/scores_{name}": q for name, q in zip(QUANTILES, quantiles, strict=True)})
    metrics = dict(zip(out, torch.stack([x.float() for x in out.values()]).tolist(), strict=True))
    metrics["rollout/distinct_2"] = distinct_n([r for _, r in roll.sequences()])
    returns = monte_carlo_returns(experience.rewards, roll, gamma, impl)
    metrics["val/explained_var"] = explained_variance(roll.values, returns)
    metrics["objective/kl_coef"] = experience.kl_coef
    return metrics
