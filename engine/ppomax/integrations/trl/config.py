"""TRL's PPOConfig, and what becomes of each of its fields in a TrainConfig."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments

from ppomax.config import (
    AdvantageConfig,
    BatchConfig,
    ConfigError,
    CriticConfig,
    KLConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PtxConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    ShardingConfig,
    TrainConfig,
)

log = logging.getLogger(__name__)


@dataclass
class PPOConfig(TrainingArguments):
    """The fields of TRL's PPOConfig with its defaults, for a TRL that has none any more, or for none at all. One of
    TRL's own is taken as well."""

    learning_rate: float = 3e-6
    logging_steps: float = 10
    num_mini_batches: int = 1
    total_episodes: int | None = None
    local_rollout_forward_batch_size: int = 64
    num_sample_generations: int = 10
    response_length: int = 53
    stop_token: Literal["eos"] | None = None
    stop_token_id: int | None = None
    temperature: float = 0.7
    missing_eos_penalty: float | None = None
    num_ppo_epochs: int = 4
    whiten_rewards: bool = False
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95


FIELDS = {
    "learning_rate": "policy_optim.lr, critic_optim.lr",
    "adam_beta1": "policy_optim.betas, critic_optim.betas",
    "adam_beta2": "policy_optim.betas, critic_optim.betas",
    "adam_epsilon": "policy_optim.eps, critic_optim.eps",
    "weight_decay": "policy_optim.weight_decay, critic_optim.weight_decay",
    "max_grad_norm": "policy_optim.grad_clip, critic_optim.grad_clip; 0: off. TRL's PPO never clipped",
    "lr_scheduler_type": "policy_optim.schedule, critic_optim.schedule: linear, cosine, constant, constant_with_warmup "
    "or inverse_sqrt",
    "warmup_steps": "policy_optim.warmup, critic_optim.warmup, as a share of all optimiser steps",
    "warmup_ratio": "policy_optim.warmup, critic_optim.warmup",
    "per_device_train_batch_size": "batch.rollout_size, times accumulation steps and ranks; batch.micro_tokens, times "
    "the longest sequence",
    "gradient_accumulation_steps": "batch.rollout_size",
    "num_mini_batches": "batch.minibatch_size, which is rollout_size / num_mini_batches",
    "num_ppo_epochs": "batch.epochs",
    "total_episodes": "run.steps, which is total_episodes / rollout_size, rounded up",
    "num_train_epochs": "run.steps, where total_episodes is not given",
    "response_length": "rollout.max_new_tokens",
    "temperature": "rollout.temperature",
    "stop_token": "a response ends at the EOS tokens of model and tokenizer, with `eos` and without",
    "stop_token_id": "the only token that ends a response",
    "missing_eos_penalty": "reward.missing_eos_penalty",
    "kl_coef": "kl.coef",
    "kl_estimator": "kl.estimator",
    "cliprange": "loss.clip_low, loss.clip_high",
    "cliprange_value": "loss.value_clip",
    "vf_coef": "loss.vf_coef; the critic has an optimiser of its own, whose Adam does not see it",
    "gamma": "advantage.gamma",
    "lam": "advantage.lam",
    "whiten_rewards": "refused: the engine has no whitening of token rewards; reward.standardize is its counterpart",
    "local_rollout_forward_batch_size": "rollout.slots",
    "num_sample_generations": "how many times samples of eval_dataset are printed",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "bf16": "model.dtype: bfloat16 weights under float32 copies, where TRL ran float32 weights under autocast",
    "fp16": "refused: no float16 training",
    "use_cpu": "run.device",
    "seed": "run.seed",
    "deepspeed": "sharding.zero_stage and offloads, from its JSON; further settings by sharding.deepspeed",
    "fsdp": "refused: models are sharded by DeepSpeed; give `deepspeed`",
    "ds3_gather_for_generation": "not needed: the engine gathers each layer once a rollout",
    "save_strategy": "when checkpoints are written, by transformers' own callback",
    "save_steps": "likewise",
    "save_total_limit": "how many checkpoints are kept",
    "logging_steps": "when rows are logged, by transformers' own callback",
    "report_to": "transformers' own callbacks",
    "output_dir": "checkpoint-N/ the policy as a HF folder, engine/ the whole state",
    "dataset_num_proc": "not needed: rows come as token ids or are encoded one by one",
    "sft_model_path": "not read by TRL's trainer either; models are passed to PPOTrainer",
    "reward_model_path": "not read by TRL's trainer either; models are passed to PPOTrainer",
    "model_adapter_name": "refused: one adapter, which PPOTrainer makes from peft_config",
    "ref_adapter_name": "refused: the reference is the policy with its adapter off",
    "world_size": "set by TRL's trainer, not by its user",
    "num_total_batches": "set by TRL's trainer, not by its user",
    "micro_batch_size": "set by TRL's trainer, not by its user",
    "local_batch_size": "set by TRL's trainer, not by its user",
    "batch_size": "set by TRL's trainer, not by its user",
    "local_mini_batch_size": "set by TRL's trainer, not by its user",
    "mini_batch_size": "set by TRL's trainer, not by its user",
    "push_to_hub": "refused: save_model() writes a folder, which huggingface_hub uploads",
}
"""Field -> knob of TrainConfig, or why there is none; COMING_FROM_TRL.md is this table."""
QUIET = {"optim", "disable_tqdm", "logging_strategy", "logging_first_step", "eval_strategy", "run_name",
         "remove_unused_columns",
         "per_device_eval_batch_size", "logging_dir", "log_level", "overwrite_output_dir", "do_train", "hub_model_id",
         "label_names", "deepspeed_plugin", "distributed_state", "accelerator_config", "local_rank"}  # fmt: skip
"""Fields of TrainingArguments that are taken as they are, or change nothing of what is learnt."""
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
             "inverse_sqrt": "inverse_sqrt"}  # fmt: skip


def train_config(
    args: Any, *, rows: int, ranks: int, longest_prompt: int, lora: Any = None, **model: Any
) -> TrainConfig:
    """The TrainConfig of a PPOConfig `args` (TRL's or ours) for a data set of `rows` prompts, the longest of so many
    tokens. lora: a peft LoraConfig. ConfigError names a field that cannot be served; fields that have no counterpart
    are logged."""
    refuse(args)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    if size % args.num_mini_batches:
        raise ConfigError(
            f"PPOConfig: num_mini_batches={args.num_mini_batches} must divide the batch of {size} "
            "(per_device_train_batch_size * gradient_accumulation_steps * ranks)"
        )
    episodes = args.total_episodes or int(args.num_train_epochs * rows)
    steps = math.ceil(episodes / size)
    optim = _optim(args, steps * args.num_ppo_epochs * args.num_mini_batches)
    return TrainConfig(
        preset="trl",
        model=ModelConfig(
            dtype="bfloat16" if args.bf16 else "float32",
            gradient_checkpointing=bool(args.gradient_checkpointing),
            **model,
            **_adapter(lora),
        ),
        batch=BatchConfig(
            rollout_size=size,
            minibatch_size=size // args.num_mini_batches,
            epochs=args.num_ppo_epochs,
            micro_tokens=args.per_device_train_batch_size * (longest_prompt + args.response_length),
        ),
        rollout=RolloutConfig(
            max_new_tokens=args.response_length,
            temperature=args.temperature,
            slots=args.local_rollout_forward_batch_size,
        ),
        reward=RewardConfig(standardize="none", clip=None, missing_eos_penalty=args.missing_eos_penalty),
        kl=KLConfig(coef=args.kl_coef, estimator=args.kl_estimator),
        advantage=AdvantageConfig(gamma=args.gamma, lam=args.lam, whiten=True),
        loss=LossConfig(
            clip_low=args.cliprange, clip_high=args.cliprange, value_clip=args.cliprange_value, vf_coef=args.vf_coef
        ),
        critic=CriticConfig(pretrain_steps=0),
        ptx=PtxConfig(coef=0.0),
        policy_optim=optim,
        critic_optim=optim,
        run=RunConfig(
            steps=steps, seed=args.seed, out=args.output_dir, device="cpu" if args.use_cpu else "auto",
            keep_checkpoints=args.save_total_limit or 2,
        ),
        sharding=_sharding(args.deepspeed),
    )  # fmt: skip


def refuse(args: Any) -> None:
    """ConfigError for what cannot be served; what has no counterpart and is not at its default is logged."""
    for name, mend in (
        ("whiten_rewards", "leave it off, or train with ppomax itself and reward.standardize"),
        ("fp16", "use bf16"),
        ("fsdp", "give `deepspeed` a JSON of ZeRO stage 2 or 3"),
        ("push_to_hub", "upload the folder that save_model() writes"),
        ("model_adapter_name", "pass peft_config"),
        ("ref_adapter_name", "pass peft_config; the reference is the policy with its adapter off"),
    ):
        if getattr(args, name, None):
            raise ConfigError(f"PPOConfig.{name}={getattr(args, name)!r} is not served; {mend}")
    if not str(getattr(args.optim, "value", args.optim)).startswith("adamw"):
        raise ConfigError(f"PPOConfig.optim={args.optim!r} is not served: both models are trained by AdamW")
    plain = PPOConfig(output_dir=args.output_dir, use_cpu=True, report_to="none")
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    for f in dataclasses.fields(args):
        same = getattr(args, f.name, None) == getattr(plain, f.name, None)
        if f.name in known and f.name not in FIELDS.keys() | QUIET and not same:
            log.warning("PPOConfig.%s=%r has no counterpart here and is left out", f.name, getattr(args, f.name))


def _optim(args: Any, optimizer_steps: int) -> OptimConfig:
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if kind not in SCHEDULES or args.lr_scheduler_kwargs:
        raise ConfigError(
            f"PPOConfig.lr_scheduler_type={kind!r} with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} is not "
            f"served; use one of {', '.join(SCHEDULES)}, without further settings"
        )
    steps = getattr(args, "warmup_steps", 0) or 0
    share = steps if 0 < steps < 1 else steps / max(1, optimizer_steps)  # transformers 5 takes shares in warmup_steps
    return OptimConfig(
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        grad_clip=args.max_grad_norm or None,
        warmup=0.0 if kind == "constant" else min(1.0, getattr(args, "warmup_ratio", None) or share),
        schedule=SCHEDULES[kind],  # type: ignore[arg-type]
        min_ratio=0.0,
    )


def _adapter(lora: Any) -> dict[str, Any]:
    """Knobs of a LoraConfig of PEFT."""
    if lora is None:
        return {}
    kind = str(getattr(lora.peft_type, "value", lora.peft_type))
    if kind != "LORA" or lora.lora_dropout or lora.bias != "none" or lora.modules_to_save:
        raise ConfigError(
            f"peft_config: {kind} with lora_dropout={lora.lora_dropout}, bias={lora.bias!r}, modules_to_save="
            f"{lora.modules_to_save} is not served; give a LoraConfig with r, lora_alpha and target_modules alone"
        )
    targets = lora.target_modules
    if targets == "all-linear":
        targets = None
    elif isinstance(targets, str):
        raise ConfigError(f"peft_config: target_modules={targets!r} is a pattern; name the layers in a list")
    return {
        "train": "lora",
        "lora_rank": lora.r,
        "lora_alpha": float(lora.lora_alpha),
        "lora_targets": tuple(sorted(targets)) if targets else None,
    }


def _sharding(deepspeed: Any) -> ShardingConfig:
    """Stage and offloads of a DeepSpeed configuration, a mapping or the path of a JSON file."""
    if not deepspeed:
        return ShardingConfig()
    if not isinstance(deepspeed, dict):
        import json
        from pathlib import Path

        deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    zero = deepspeed.get("zero_optimization", {})
    return ShardingConfig(
        zero_stage=zero.get("stage", 0),
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offload_param=zero.get("offload_param", {}).get("device", "none") != "none",
    )
