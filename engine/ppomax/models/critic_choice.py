"""The critic that an engine trains, from what was given or configured for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ppomax.config import TrainConfig
from ppomax.models.adapter_critic import NO_REWARD_MODEL, AnyCritic, adapter_critic
from ppomax.models.branch import TrunkCritic
from ppomax.models.critic import Critic, RewardModel, make_critic, take_length_out
from ppomax.sharding import model_to_copy


def critic_of(
    wanted: Any,
    policy: PreTrainedModel,
    reward_model: RewardModel | None,
    sources: Mapping[str, Any],
    trunk_layers: int | None,
    config: TrainConfig,
    dtype: torch.dtype,
    zero: dict[str, Any] | None,
) -> AnyCritic:
    """wanted: a critic, a model or path to start one from, or what `model.critic` may say; sources: the paths of policy
    and reward model; zero: how weights are read in parts. ValueError: it does not fit the other models."""
    if isinstance(wanted, (str, Path)) and config.model.critic_train == "lora":
        return adapter_critic(wanted, policy, reward_model, config.model, dtype=dtype, seed=config.run.seed)
    if wanted == "reward_model":
        if reward_model is None:
            raise ValueError(NO_REWARD_MODEL)
        wanted = model_to_copy(reward_model, sources["reward"], zero)
    elif wanted == "trunk" and trunk_layers is not None:
        return TrunkCritic(policy, trunk_layers, seed=config.run.seed).requires_grad_(True)
    elif wanted == "policy":
        wanted = model_to_copy(policy, sources["policy"], zero)
    if isinstance(wanted, TrunkCritic) and wanted.branch.layers != trunk_layers:
        raise ValueError(
            f"Engine: the critic stands on a trunk of {wanted.branch.layers} blocks, the policy's has "
            f"{trunk_layers or 'none'}; give another critic, or set model.train: hydra and trained_layers"
        )
    if isinstance(wanted, (Critic, TrunkCritic)) and not isinstance(wanted, RewardModel):
        return wanted.requires_grad_(True)
    made = make_critic(wanted, dtype, seed=config.run.seed, zero=zero)
    return take_length_out(made) if made.raw else made
