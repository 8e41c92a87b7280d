"""Reward functions written for other trainers, as `reward.function` and `Engine(reward=...)` take them: one line each.

accuracy = from_trl(accuracy)              # TRL: f(prompts, completions, **columns), as its GRPOTrainer calls it
solved = from_verl(compute_score)          # verl: f(data_source, solution_str, ground_truth, extra_info), a row each
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ppomax.recipe.rewards import RewardError


def from_trl(function: Callable[..., Sequence[float]]) -> Callable[..., Sequence[float]]:
    """Called with keywords alone, as TRL does: prompts, completions, completion_ids, prompt_ids and every column of the
    data. Completions are plain texts."""

    def reward(prompts: list[str], responses: list[str], **columns: Any) -> Sequence[float]:
        ids = {"completion_ids": columns.pop("response_ids"), "prompt_ids": columns.pop("prompt_ids")}
        columns.pop("finished")
        columns.pop("prompt", None)  # TRL's own name for it is prompts
        return function(prompts=prompts, completions=responses, **ids, **columns)

    return _named(reward, function)


def from_verl(function: Callable[..., Any]) -> Callable[..., Sequence[float]]:
    """Called for each response with the row's data_source, reward_model["ground_truth"] and extra_info, as verl's
    reward managers do; it gives a number, or a mapping with `score`."""

    def reward(
        prompts: list[str],
        responses: list[str],
        *,
        data_source: list[str],
        reward_model: list[Mapping[str, Any]],
        extra_info: list[Any] | None = None,
    ) -> list[float]:
        extras = extra_info or [None] * len(responses)
        found = []
        for source, text, rule, extra in zip(data_source, responses, reward_model, extras, strict=True):
            if not isinstance(rule, Mapping) or "ground_truth" not in rule:
                raise RewardError(
                    f"reward_model must be a mapping with ground_truth, as verl's data has it, got {rule!r:.80}"
                )
            given = function(data_source=source, solution_str=text, ground_truth=rule["ground_truth"], extra_info=extra)
            found.append(float(given["score"] if isinstance(given, Mapping) else given))
        return found

    return _named(reward, function)


def _named(reward: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    reward.__name__ = getattr(function, "__name__", type(function).__name__)
    return reward
