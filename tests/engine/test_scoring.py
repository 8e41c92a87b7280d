"""Scoring: what stands in for an empty micro-batch leaves no trace; values after the last tokens, and what a truncated
response makes of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ppomax.config import ConfigError, load_config
from ppomax.engine import Engine
from ppomax.recipe.batch import Rollout
from ppomax.recipe.rewards import ModelReward
from ppomax.recipe.rollout import Scorers, score
from ppomax.rollout import Responses

from tests.engine.tiny import prompts, small_config, tiny_engine, tiny_reward


def scored(engine: Engine, roll: Rollout, micro_batches: list[list[torch.Tensor]], **named: bool) -> Rollout:
    given = roll.sequences()
    responses = Responses([r for _, r in given], [[0.0] * len(r) for _, r in given], roll.finished.tolist())
    models = Scorers(engine.policy.module, engine.reference, engine.critic.module, engine.trunk_layers)
    return score(models, [p for p, _ in given], responses, micro_batches, impl="ref", **named)


def test_a_stand_in_leaves_no_trace() -> None:
    """An empty micro-batch, as a rank has that keeps step with others, after the one that the shortest sequence, which
    stands in, is scored in."""
    engine = tiny_engine(small_config(model__critic="policy"))
    roll = engine.rollout(prompts(6))
    alone = [[torch.arange(6)]]
    followed = [[torch.arange(6)], [torch.zeros(0, dtype=torch.int64)]]
    one, two = (scored(engine, roll, micros, last_values=True) for micros in (alone, followed))
    for name in ("logprobs", "entropy", "ref_logprobs", "values", "last_values"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    reward = ModelReward(tiny_reward())
    assert torch.equal(reward(one).total, reward(dataclasses.replace(two, micro_batches=followed)).total)


@pytest.mark.parametrize("mode", ["full", "lora", "hydra"])
def test_last_values_are_the_critics_after_the_last_token(mode: str) -> None:
    knobs = {"model__train": mode, "model__trained_layers": 1, "model__critic": "policy"}
    engine = tiny_engine(small_config(advantage__bootstrap_truncated=True, **knobs))
    roll = engine.rollout(prompts(8))
    whole = engine.critic.module(roll.tokens, roll.cu_seqlens)
    torch.testing.assert_close(roll.last_values, whole[roll.cu_seqlens[1:].long() - 1], rtol=1e-5, atol=1e-6)
    assert tiny_engine(small_config(**knobs)).rollout(prompts(8)).last_values is None


def test_a_truncated_response_goes_on_in_the_critics_eyes() -> None:
    """Each sequence by the recursion, one token beyond its end where it was cut."""
    knobs = {"advantage__bootstrap_truncated": True, "advantage__gamma": 0.9, "advantage__lam": 0.8}
    engine = tiny_engine(small_config(rollout__max_new_tokens=4, **knobs))
    experience = engine.experience(engine.rollout(prompts(8)))
    roll = experience.rollout
    assert 0 < int(roll.finished.sum()) < 8
    assert roll.last_values is not None
    for i, (begin, end) in enumerate(zip(roll.response_cu[:-1].tolist(), roll.response_cu[1:].tolist(), strict=True)):
        following, after = 0.0, 0.0 if roll.finished[i] else float(roll.last_values[i])
        for t in reversed(range(begin, end)):
            delta = float(experience.rewards[t]) + 0.9 * after - float(roll.values[t])
            following, after = delta + 0.9 * 0.8 * following, float(roll.values[t])
            assert float(experience.advantages[t]) == pytest.approx(following, rel=1e-4, abs=1e-5)
            assert float(experience.returns[t]) == pytest.approx(following + after, rel=1e-4, abs=1e-5)


def test_last_values_are_in_the_units_of_the_others() -> None:
    engine = tiny_engine(small_config(advantage__bootstrap_truncated=True))
    raw = engine.rollout(prompts(8))
    found = engine.experience(raw)
    assert found.rollout.last_values is not None
    assert raw.last_values is not None
    want = (raw.last_values - found.moments.mean) / found.moments.std
    torch.testing.assert_close(found.rollout.last_values, want)
    assert not torch.allclose(want, raw.last_values)


def test_a_critic_on_the_trunk_has_no_last_value() -> None:
    knobs = {"model.train": "hydra", "model.critic": "trunk", "advantage.bootstrap_truncated": True}
    with pytest.raises(ConfigError, match=r"advantage\.bootstrap_truncated needs the value"):
        load_config(overrides=knobs)
