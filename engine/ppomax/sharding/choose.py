"""Which form a model takes on this job's ranks, as `config.sharding` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ppomax.config import OptimConfig, ShardingConfig
from ppomax.sharding.plain import DataParallel, Trained
from ppomax.sharding.ranks import world_size

M = TypeVar("M", bound=nn.Module)


def stage_of(config: ShardingConfig) -> int | None:
    """The ZeRO stage of the trained models; None: plain torch in one process. Several ranks start from stage 2."""
    if config.zero_stage is None:
        return None if world_size() == 1 else 2
    return config.zero_stage


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
    if config.frozen == "whole" or (config.frozen == "auto" and stage_of(config) != 3):
        return module
    from ppomax.sharding.zero import ZeroFrozen

    return ZeroFrozen(module, config)


def run(owner: Any, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """`function(module, *args)` of a plain module, or through the object that holds a sharded one."""
    if isinstance(owner, nn.Module):
        return function(owner, *args, **named)
    return owner.run(function, *args, **named)
