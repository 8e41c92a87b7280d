"""What an engine's `reward` becomes: a frozen model, a function of texts, or several of both, weighed and added."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.config import ConfigError, RewardConfig, TrainConfig
from ppomax.models import RewardModel, freeze, load_reward_model, load_tokenizer, set_attention
from ppomax.models.frozen_bits import place
from ppomax.recipe.batch import Rollout, last_tokens
from ppomax.recipe.reward_pool import Pooled
from ppomax.recipe.rewards import FunctionReward, ModelReward, RewardSource, Scores, load_function
from ppomax.recipe.text_reward import TextModelReward

ModelOrFunction = str | Path | PreTrainedModel | RewardModel | Callable[..., Any]
Weighed = Sequence[tuple[float, ModelOrFunction]]
"""(weight, a reward model, a path to one, or a function), ..."""


class SumReward:
    """Several sources: the sum of weight * score."""

    def __init__(self, parts: dict[str, tuple[float, RewardSource]]):
        self.parts = parts

    def each(self, rollout: Rollout) -> dict[str, Scores]:
        """Raw scores of each source, by its name."""
        return {name: source(rollout) for name, (_, source) in self.parts.items()}

    def __call__(self, rollout: Rollout) -> Scores:
        return self.total(self.each(rollout), rollout)

    def total(self, scores: dict[str, Scores], rollout: Rollout) -> Scores:
        """Sum of weight * score; token by token if one of them is given so."""
        total = torch.stack([self.parts[name][0] * x.total for name, x in scores.items()]).sum(0)
        if all(x.tokens is None for x in scores.values()):
            return Scores(total)
        ends, tokens = last_tokens(rollout.response_cu), torch.zeros(len(rollout.states), device=total.device)
        for name, x in scores.items():
            weight = self.parts[name][0]
            tokens = tokens.index_add(0, ends, weight * x.total) if x.tokens is None else tokens + weight * x.tokens
        return Scores(total, tokens)


class Found(NamedTuple):
    """What `reward_source` made."""

    source: RewardSource
    model: RewardModel | None
    """The reward model among it, frozen, whole or in this rank's parts."""
    read_by: ModelReward | None
    """The source that reads it."""


def reward_source(
    reward: ModelOrFunction | Weighed,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    zero: dict[str, Any] | None,
) -> Found:
    """The source of an engine's `reward`; zero: DeepSpeed's settings of a model that is read in parts. TypeError: it is
    neither a model nor a function; ValueError: a function without a tokenizer, or more than one model."""
    if isinstance(reward, (list, tuple)):
        return _sum([(float(w), reward_source(x, config, device, dtype, tokenizer, zero), x) for w, x in reward])
    if isinstance(reward, (str, Path, PreTrainedModel, RewardModel)):
        trust = config.model.trust_remote_code
        model = load_reward_model(reward, dtype, trust_remote_code=trust, zero=zero)
        set_attention(place(freeze(model), device, config.model), config.model.attention)
        source = ModelReward(model, config.impl)
        if config.reward.tokenizer is not None:
            if tokenizer is None:
                raise ValueError("Engine: reward.tokenizer is set, so the policy's is needed too; pass tokenizer=")
            own = load_tokenizer(config.reward.tokenizer, trust_remote_code=trust)
            source = TextModelReward(model, config.impl, tokenizer, own, config.batch.micro_tokens)
        return Found(source, model, source)
    if not callable(reward):
        raise TypeError(
            "Engine: reward must be a reward model, a path to one, a function of texts, or a list of (weight, one of "
            f"these), got {type(reward).__name__}"
        )
    if tokenizer is None:
        raise ValueError("Engine: a reward function reads text, so a tokenizer is needed; pass tokenizer=")
    return Found(FunctionReward(reward, tokenizer, config.reward.timeout), None, None)


def _sum(parts: list[tuple[float, Found, Any]]) -> Found:
    if not parts:
        raise ValueError("Engine: reward is an empty list; give at least one (weight, reward model or function)")
    models = [found for _, found, _ in parts if found.model is not None]
    if len(models) > 1:
        raise ValueError("Engine: reward has two reward models; give one, and the other inside a function of texts")
    named: dict[str, tuple[float, RewardSource]] = {}
    for weight, found, given in parts:
        name = "reward_model" if found.model is not None else getattr(given, "__name__", type(given).__name__)
        while name in named:
            name += "'"
        named[name] = (weight, found.source)
    model = models[0] if models else Found(parts[0][1].source, None, None)
    return Found(SumReward(named), model.model, model.read_by)


def named_rewards(config: RewardConfig, model: str) -> tuple[Any, list[Callable[..., Any]]]:
    """What a configuration says of the reward, as `Engine(reward=...)` takes it, and the functions in it. model: the
    reward model's path; "": there is none. ConfigError: a time limit for a function that nothing can stop."""
    functions: list[tuple[float, Callable[..., Any]]] = []
    for weight, spec in config.terms:
        function = load_function(spec)
        if config.workers:
            function = Pooled(spec, config.workers, config.timeout)
        elif config.timeout is not None and not inspect.iscoroutinefunction(function):
            raise ConfigError(
                f"config: reward.timeout={config.timeout:g} cannot stop {spec} in this process; set reward.workers to "
                "1 or more, or make the function async"
            )
        functions.append((weight, function))
    parts: list[tuple[float, Any]] = [(config.model_weight, model)] if model else []
    parts += functions
    alone = len(parts) == 1 and parts[0][0] == 1
    return parts[0][1] if alone else parts, [function for _, function in functions]


def model_path(reward: Any) -> str | None:
    """The path of the model in what an engine is given, alone or among other rewards, if it is one."""
    given = [x for _, x in reward] if isinstance(reward, (list, tuple)) else [reward]
    return next((str(x) for x in given if isinstance(x, (str, Path))), None)
