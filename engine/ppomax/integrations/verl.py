"""verl: our clipped policy loss and GAE, under the name `ppomax`, and our fused linear log-probability.

    actor_rollout_ref.model.external_lib=ppomax.integrations.verl         imported in every worker, which registers all
    actor_rollout_ref.actor.policy_loss.loss_mode=ppomax                  in place of `vanilla`
    actor_rollout_ref.model.use_fused_kernels=True                        logprobs and entropy from hidden states, by
    actor_rollout_ref.model.fused_kernel_options.impl_backend=torch       linear_token_logprobs in place of verl's
The trainer's own process, which external_lib does not reach, computes advantages: where this module is imported there
too, `algorithm.adv_estimator=gae` is ours. (Under a name of its own an estimator gets no values from verl's trainer.)
All equal verl's own functions (tests/integrations/test_verl.py); what differs by design stands in padded.py.
Known: verl 0.8 and 0.9. Another signature is refused with IntegrationError."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ppomax_kernels as K
from torch import Tensor
from verl.trainer.ppo import core_algos
from verl.utils.experimental import torch_functional

from ppomax.integrations import check_signature
from ppomax.integrations.padded import Aggregation, Clip, clipped_policy_loss, whitened_gae

NAME = "ppomax"
POLICY_LOSS = ("old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config",
               "rollout_is_weights")  # fmt: skip
GAE = ("token_level_rewards", "values", "response_mask", "gamma", "lam")
FUSED_LINEAR = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")
AGGREGATION = ("loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens", "global_batch_size",
               "loss_scale_factor")  # fmt: skip


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `vanilla` policy loss: 0-d loss, and `actor/...` metrics as plain floats, read back together."""
    low, high = (getattr(config, name) for name in ("clip_ratio_low", "clip_ratio_high"))
    clip = Clip(
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
        config.get("clip_ratio_c", 3.0),
    )
    over = Aggregation(loss_agg_mode, **config.global_batch_info)
    loss, found = clipped_policy_loss(old_log_prob, log_prob, advantages, response_mask, clip, over, rollout_is_weights)
    return loss, {f"actor/{name}": value.item() for name, value in found.items()}


def gae(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float, **others: Any
) -> tuple[Tensor, Tensor]:
    """verl's `gae` estimator; verl may hand in more than an estimator asks for."""
    return whitened_gae(token_level_rewards, values, response_mask, gamma, lam)


def fused_linear(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: Any = 1.0
) -> tuple[Tensor, Tensor]:
    """verl's `FusedLinearForPPO.forward`: (..., D) and (V, D) and labels (...) -> log-probabilities, float32, and
    entropies, in hidden_states' dtype, both differentiable. temperature: a number, or (...) of them."""
    if isinstance(temperature, Tensor):
        hidden_states, temperature = hidden_states / temperature[..., None].to(hidden_states.dtype), 1.0
    found = K.linear_token_logprobs(
        hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous(),
        vocab_weights,
        input_ids.reshape(-1).long(),
        temperature=float(temperature),
        return_entropy=True,
    )
    logprobs, entropy = (x.view(input_ids.shape) for x in found)
    return logprobs, entropy.to(hidden_states.dtype)


def register(algorithms: Any = core_algos, functional: Any = torch_functional) -> None:
    """Register losses under NAME, and put ours in FusedLinearForPPO's place. IntegrationError: verl's own functions
    take other parameters than ours stand in for."""
    try:
        named = f"verl {version('verl')}"
    except PackageNotFoundError:
        named = "this verl"
    if algorithms.compute_gae_advantage_return is gae:
        return
    for function, known in (
        (algorithms.compute_policy_loss_vanilla, POLICY_LOSS),
        (algorithms.compute_gae_advantage_return, GAE),
        (algorithms.agg_loss, AGGREGATION),
        (functional.FusedLinearForPPO.forward, FUSED_LINEAR),
    ):
        check_signature(function, known, named)
    algorithms.register_policy_loss(NAME)(policy_loss)
    algorithms.register_adv_est(NAME)(gae)
    algorithms.compute_gae_advantage_return = gae
    functional.FusedLinearForPPO.forward = fused_linear


register()
