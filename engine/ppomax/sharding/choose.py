"""Which form a model takes on this job's ranks, and how it comes to it, as `config.sharding` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ppomax.config import ConfigError, OptimConfig, ShardingConfig, TrainConfig
from ppomax.sharding import ranks, zero_config
from ppomax.sharding.plain import DataParallel, Trained
from ppomax.sharding.weights import made_weights

M = TypeVar("M", bound=nn.Module)


def stage_of(config: ShardingConfig) -> int | None:
    """The ZeRO stage of the trained models; None: plain torch in one process. Several ranks start from stage 2."""
    if config.zero_stage is None:
        return None if ranks.world_size() == 1 else 2
    return config.zero_stage


def shards_frozen(config: ShardingConfig) -> bool:
    """Whether frozen models are cut over the ranks (`sharding.frozen`)."""
    return config.frozen in ("sharded", "offloaded") or (config.frozen == "auto" and stage_of(config) == 3)


@dataclass(frozen=True)
class ShardedReads:
    """DeepSpeed's settings of the models that are read from their files straight into partitions; None: a model that is
    read whole, and cut afterwards if at all."""

    policy: dict[str, Any] | None = None
    critic: dict[str, Any] | None = None
    frozen: dict[str, Any] | None = None


def sharded_reads(config: TrainConfig, dtype: torch.dtype, *, from_files: bool) -> ShardedReads:
    """What of a run is read so: models that ZeRO-3 will cut, on several ranks. from_files: the policy is a path.

    Top blocks are copied from a whole model, so hydra's policy is read whole; models with code of their own are read by
    transformers. ConfigError if DeepSpeed cannot do what `config.sharding` asks on these ranks."""
    sharding = config.sharding
    zero_config.check(sharding, ranks.world_size())
    if config.loss.joint_grad_clip and stage_of(sharding):
        raise ConfigError(
            f"config: loss.joint_grad_clip holds the gradients of both models together, but ZeRO stage "
            f"{stage_of(sharding)} clips each model by itself; leave it off, or set sharding.zero_stage: 0"
        )
    if sharding.idle == "host" and (stage_of(sharding) or shards_frozen(sharding)):
        raise ConfigError(
            "config: sharding.idle=host moves whole models, and these are cut over the ranks; set sharding.zero_stage: "
            "0 and sharding.frozen: whole, or leave it and use frozen: offloaded, offload_param, offload_optimizer"
        )
    on_reward_model = config.model.critic == "reward_model" and shards_frozen(sharding)
    if config.model.critic_train == "lora" and (stage_of(sharding) == 3 or on_reward_model):
        raise ConfigError(
            "config: model.critic_train=lora shares the weights of another model, which must be whole on each rank; "
            "set sharding.zero_stage to 0, 1 or 2, and sharding.frozen to whole or model.critic to policy"
        )
    if ranks.world_size() == 1 or config.model.trust_remote_code:
        return ShardedReads()
    frozen = zero_config.frozen(sharding, dtype) if shards_frozen(sharding) else None
    if stage_of(sharding) != 3 or config.model.train == "hydra" or not from_files:
        return ShardedReads(frozen=frozen)
    policy, critic = (
        zero_config.trained(sharding, 3, dtype, optim.grad_clip) for optim in (config.policy_optim, config.critic_optim)
    )
    return ShardedReads(policy, critic, frozen)


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 has cut its parameters."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


def model_to_copy(model: M, path: str | None, zero: dict[str, Any] | None = None) -> M | str:
    """What a second model that starts as `model` is made from: `model`; or its files `path`, where one of the two lies
    in parts, or in few bits, which are read anew and not copied. zero: the second one's settings. ValueError: there are
    no such files."""
    in_bits = bool(made_weights(model))
    if in_bits and path is None:
        raise ValueError(
            "Engine: with model.frozen_bits a critic that is trained whole starts from files; give the path of the "
            "model that it starts as, or set model.critic_train: lora"
        )
    return path if path is not None and (zero is not None or in_bits or is_sharded(model)) else model


def train_model(module: M, optim: OptimConfig, total_steps: int, config: ShardingConfig) -> Trained[M]:
    """`module` under AdamW: plain, data parallel, or a DeepSpeed engine of its own."""
    stage = stage_of(config)
    if stage is None:
        return Trained(module, optim, total_steps)
    if stage == 0:
        return DataParallel(module, optim, total_steps)
    from ppomax.sharding.zero import ZeroTrained

    return ZeroTrained(module, optim, total_steps, config, stage)


def freeze_model(module: M, config: ShardingConfig) -> Any:
    """A frozen model: itself, or cut over the ranks (`sharding.frozen`)."""
    if not shards_frozen(config):
        return module
    from ppomax.sharding.zero import ZeroFrozen

    return ZeroFrozen(module, config)


def call(owner: Any, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """`function(module, *args)` of a plain module, or through the object that holds a sharded one."""
    if isinstance(owner, nn.Module):
        return function(owner, *args, **named)
    return owner.call(function, *args, **named)
