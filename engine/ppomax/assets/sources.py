"""Which policy, reward model and prompts a configuration names: what ships with ppomax where it names no policy."""

from __future__ import annotations

from typing import NamedTuple

from ppomax.assets import DEFAULT, named_model, named_prompts, shipped
from ppomax.config import ConfigError, TrainConfig


class NamedSources(NamedTuple):
    """Paths or hub names; "": none is named, or wanted."""

    policy: str
    reward_model: str
    prompts: str
    eval_prompts: str = ""


def named_sources(config: TrainConfig) -> NamedSources:
    """As the configuration says; may lack what a run needs (see `run_sources`)."""
    model = config.model
    if not config.reward.uses_model:
        reward_model = ""
    elif model.reward_model:
        reward_model = named_model(model.reward_model, "reward_model")
    else:
        reward_model = "" if model.policy is not None else str(shipped("reward_model"))
    if model.policy is not None:
        policy, prompts = named_model(model.policy), config.data.prompts or ""
    else:
        policy, prompts = str(shipped("policy")), config.data.prompts or DEFAULT
    held_out = config.data.eval_prompts or (DEFAULT if prompts == DEFAULT else "")
    return NamedSources(policy, reward_model, named_prompts(prompts), named_prompts(held_out, held_out=True))


def run_sources(config: TrainConfig) -> NamedSources:
    """The same, for a run. ConfigError if its reward model (without a reward function) or its prompts are missing."""
    found = named_sources(config)
    if not found.reward_model and not config.reward.terms:
        raise ConfigError("config: model.policy is set, so model.reward_model or reward.function must be too")
    if not found.prompts:
        raise ConfigError("config: model.policy is set, so data.prompts must be too")
    return found
