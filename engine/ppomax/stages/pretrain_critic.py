"""Critic pre-training: the policy frozen, the critic regressed on Monte-Carlo returns.

    G_t = sum of rewards from t on (gamma discounted);  1/2 * mean (V - G)^2;  stop once a fresh buffer has
    1 - mean (G - V)^2 / Var(G) >= critic.pretrain_explained_variance
A critic that starts as a reward model scores early tokens as if the text ended there; PPO's first advantages would
carry that error (arXiv 2503.01491). The optimiser's moments carry over into PPO, its schedule does not move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ppomax_kernels as K
import torch

from ppomax.engine import Engine
from ppomax.models import any_pads
from ppomax.recipe.batch import MicroBatches, Rollout, select, select_trunk, with_stand_in
from ppomax.recipe.measures import explained_variance, monte_carlo_returns
from ppomax.recipe.scoring import state_values
from ppomax.recipe.streams import Purpose, stream
from ppomax.sharding import ranks


def pretrain_critic(
    engine: Engine, prompts: Sequence[Sequence[int]], columns: Mapping[str, Sequence[Any]] | None = None
) -> tuple[dict[str, float], bool]:
    """One fresh buffer: measure, and train on it unless the critic is good enough. Returns metrics, and whether it
    was."""
    config = engine.config
    experience = engine.experience(engine.rollout(prompts, columns))
    engine.take_up(experience)
    roll = experience.rollout
    returns = monte_carlo_returns(experience.rewards, roll, config.advantage.gamma, config.impl)
    explained = explained_variance(roll.values, returns)
    metrics = {
        "pretrain/explained_var": explained,
        "objective/scores": float(experience.scores.mean()),
        "objective/scores_std": float(experience.scores.std(unbiased=False)),
    }
    if explained >= config.critic.pretrain_explained_variance:
        return metrics, True
    losses: list[float] = []
    shuffle = stream(config.run.seed, Purpose.CRITIC_EPOCHS, engine.buffers)
    for epoch in range(config.critic.pretrain_epochs):
        minibatches: MicroBatches = roll.micro_batches
        if epoch:
            minibatches = roll.another_pass(config.batch, shuffle, padded=any_pads(engine.critic))
        losses += [_train(engine, experience.rollout, returns, micros) for micros in minibatches]
    metrics["pretrain/value_loss"] = sum(losses) / len(losses)
    return metrics, False


def _train(engine: Engine, roll: Rollout, returns: torch.Tensor, micros: list[torch.Tensor]) -> float:
    """One optimiser step of the critic on the sequences of `micros`; returns the loss."""
    config, critic = engine.config, engine.critic
    device, loss = returns.device, torch.zeros((), device=returns.device)
    own = sum(int(roll.lengths[m.to(device)].sum()) for m in micros)
    count = ranks.sum(torch.tensor(float(own), device=device))
    for i, micro in enumerate(micros):
        which = with_stand_in(micro, roll.on_host[0])
        tokens, cu, states, slots = select(roll, which)
        values = critic.call(state_values, tokens, cu, states, select_trunk(roll.trunk, roll.on_host[0], which))
        share, _ = K.value_loss(values, values.detach(), returns[slots], clip=None, normalizer=count, impl=config.impl)
        share = share * float(len(micro) > 0)
        critic.backward(share, last=i + 1 == len(micros))
        loss += share.detach()
    loss, norm = ranks.sum(loss), critic.grad_norm()
    good = bool(torch.isfinite(loss + norm))
    if good:
        critic.step(norm, lr=config.critic.pretrain_lr or config.critic_optim.lr)
    else:
        critic.skip(advance=False)
    engine.health.note(good, config.run.max_bad_steps)
    return float(loss)
