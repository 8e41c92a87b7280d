"""The DeepSpeed configuration of each engine: ours, with the user's file laid over it.

A key that ours must own (batch sizes, accumulation, clip, stage ...) may be in the file only with our value; anything
else in it is passed through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ppomax.config import ConfigError, ShardingConfig
from ppomax.config.mapping import read_yaml

OWNED = {
    "optimizer": "policy_optim and critic_optim",
    "scheduler": "policy_optim.schedule and critic_optim.schedule",
    "train_batch_size": "batch.minibatch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_tokens",
    "gradient_accumulation_steps": "batch.minibatch_size and batch.micro_tokens",
    "gradient_clipping": "policy_optim.grad_clip and critic_optim.grad_clip",
    "fp16": "model.dtype (float32 or bfloat16; float16 would need a loss scale)",
    "bf16": "model.dtype",
    "zero_optimization.stage": "sharding.zero_stage",
    "zero_optimization.offload_optimizer": "sharding.offload_optimizer",
    "zero_optimization.offload_param": "sharding.offload_param",
    "zero_optimization.zero_hpz_partition_size": "sharding.hpz",
    "zero_optimization.zero_quantized_weights": "sharding.quantized_weights",
    "managed_gradient_accumulation": "nothing: ppomax counts its micro-batches itself",
}
"""DeepSpeed key -> the knob of ours that says it."""


def trained(config: ShardingConfig, stage: int, dtype: torch.dtype, clip: float | None) -> dict[str, Any]:
    """For a model with an optimiser."""
    zero: dict[str, Any] = {"stage": stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3:
        zero |= _partitioned(config, offload=config.offload_param)
    return _complete(config, zero, dtype) | {"gradient_clipping": clip or 0.0}


def frozen(config: ShardingConfig, dtype: torch.dtype) -> dict[str, Any]:
    """For a model without one: weights cut over the ranks, on the GPU or on the host."""
    offload = config.frozen == "offloaded" or config.offload_param
    return _complete(config, {"stage": 3, **_partitioned(config, offload=offload)}, dtype)


def check(config: ShardingConfig, ranks: int) -> None:
    """ConfigError for what DeepSpeed cannot do on so many ranks, or on their devices."""
    if config.hpz > 1 and ranks % config.hpz:
        raise ConfigError(
            f"config: sharding.hpz={config.hpz} ranks are to hold the weights among them, and there are {ranks} in "
            "all; set it to a divisor of that (the GPUs of one node), or to 1 for off"
        )
    if config.quantized_weights:
        from deepspeed.accelerator import get_accelerator

        device = get_accelerator().device_name()
        if device == "cpu":
            raise ConfigError(
                "config: sharding.quantized_weights needs a GPU, since DeepSpeed has no int8 quantiser for CPUs; leave "
                "it false here"
            )


def _partitioned(config: ShardingConfig, *, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"zero_hpz_partition_size": config.hpz, "zero_quantized_weights": config.quantized_weights}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return zero


def _complete(config: ShardingConfig, zero: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 62,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
    }
    return _over(ours, extra(config))


def extra(config: ShardingConfig) -> dict[str, Any]:
    """The user's own DeepSpeed file; ConfigError if it is not there, or says what a knob of ours says otherwise."""
    if config.deepspeed is None:
        return {}
    if not Path(config.deepspeed).is_file():
        raise ConfigError(f"config: sharding.deepspeed={config.deepspeed} is not a file; name a JSON or YAML file")
    given = read_yaml(config.deepspeed)
    for key, knob in OWNED.items():
        at: Any = given
        for part in key.split("."):
            at = at.get(part) if isinstance(at, dict) else None
        if at is None or at == "auto" or _says_the_same(key, at, config):
            continue
        raise ConfigError(
            f"config: sharding.deepspeed={config.deepspeed} sets {key}={at!r}, which contradicts ours; that is said by "
            f"{knob}; take it out of the file"
        )
    return given


def _says_the_same(key: str, value: Any, config: ShardingConfig) -> bool:
    same = {
        "zero_optimization.stage": config.zero_stage,
        "zero_optimization.zero_hpz_partition_size": config.hpz,
        "zero_optimization.zero_quantized_weights": config.quantized_weights,
    }
    if key in ("fp16", "bf16"):
        return value == {"enabled": False} and key == "fp16"
    return key in same and value == same[key]


def _over(ours: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` laid over `ours`, section by section, without the keys that are ours."""
    out = dict(ours)
    for key, value in given.items():
        if key in OWNED:
            continue
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            kept = {k: v for k, v in value.items() if f"{key}.{k}" not in OWNED}
            out[key] = {**out[key], **kept}
        else:
            out[key] = value
    return out
