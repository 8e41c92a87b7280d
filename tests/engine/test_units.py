"""Rewards and values have one unit: what a constant, or a factor, does to a reward model changes nothing of a run; what
the critic has learnt keeps its meaning when the moments move; explained variance sees a bias."""

from __future__ import annotations

import itertools

import pytest
import torch
from ppomax.config import RewardConfig
from ppomax.engine import Engine
from ppomax.recipe.measures import explained_variance, monte_carlo_returns
from ppomax.recipe.moments import RunningMoments
from ppomax.recipe.units import RAW, Units, moved, units_of

from tests.engine.tiny import prompts, small_config, tiny_engine, tiny_policy, tiny_reward


def engine_with(factor: float, constant: float, **knobs: object) -> Engine:
    """PPO-max with the tiny reward model's scores x made factor * x + constant."""
    reward = tiny_reward()
    with torch.no_grad():
        reward.score.weight.mul_(factor)
    reward.model.config.score_offset = constant
    return tiny_engine(small_config("ppo-max", **knobs), reward=reward)


def weights(engine: Engine) -> list[torch.Tensor]:
    return [p.detach().clone() for part in (engine.policy, engine.critic) for p in part.module.parameters()]


@pytest.mark.parametrize("knobs", [{}, {"model__train": "hydra", "model__trained_layers": 1}], ids=["full", "hydra"])
@pytest.mark.parametrize(("factor", "constant"), [(1.0, 5.0), (3.0, -5.0), (0.2, 20.0)])
def test_an_affine_change_of_the_reward_model_changes_nothing(factor: float, constant: float, knobs: dict) -> None:
    moves, starts, figures = [], [], []
    for change in ((1.0, 0.0), (factor, constant)):
        engine = engine_with(*change, **knobs)
        start = weights(engine)
        rows = [engine.step(prompts(8, seed=i)).metrics for i in range(3)]
        moves.append([after - before for after, before in zip(weights(engine), start, strict=True)])
        starts.append(start)
        figures.append(rows)
    for a, b in zip(*starts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    a, b = (torch.cat([x.flatten() for x in move]) for move in moves)
    assert a.norm() > 0
    assert (a - b).norm() <= 1e-4 * a.norm()
    for first, second in zip(*figures, strict=True):
        assert second["objective/shaped_scores"] == pytest.approx(first["objective/shaped_scores"], abs=1e-4)
        for name in ("critic/values", "val/explained_var", "policy/advantages", "loss/value_avg"):
            assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-4), name


def test_a_constant_is_seen_in_the_first_advantages_without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr("ppomax.engine.moved", lambda values, old, new: values)
    means = []
    for constant in (0.0, 5.0):
        engine = engine_with(1.0, constant)
        means.append(float(engine.experience(engine.rollout(prompts(8))).rollout.values.mean()))
    assert abs(means[1] - means[0]) > 1.0


def test_a_new_head_stays_in_the_units_that_it_starts_in() -> None:
    engine = tiny_engine(small_config("ppo-max", model__critic="policy"))
    assert engine.units is None
    roll = engine.rollout(prompts(8))
    experience = engine.experience(roll)
    assert torch.equal(experience.rollout.values, roll.values)
    engine.update(experience)
    assert engine.units == experience.units
    assert vars(engine.critic.module.scale) == {"gain": 1.0, "shift": 0.0}


def test_values_keep_their_meaning_when_the_moments_move() -> None:
    engine = engine_with(2.0, 3.0)
    roll = engine.rollout(prompts(8))
    first = engine.experience(roll)
    raw = first.units.mean + first.units.std * first.rollout.values
    torch.testing.assert_close(raw, roll.values, rtol=1e-5, atol=1e-5)
    engine.take_up(first)
    again = engine.rollout(prompts(8, seed=1))
    second = engine.experience(again)
    assert second.units != first.units
    before = first.units.mean + first.units.std * again.values
    after = second.units.mean + second.units.std * second.rollout.values
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    engine.take_up(second)
    metrics = engine.update(second)
    assert metrics["val/first_value_gap"] <= 1e-5


def test_a_checkpoint_keeps_the_units(tmp_path) -> None:  # type: ignore[no-untyped-def]
    one = engine_with(2.0, 3.0)
    one.step(prompts(8))
    one.save(tmp_path / "at")
    two = engine_with(2.0, 3.0)
    two.restore(tmp_path / "at")
    assert two.units == one.units != RAW
    assert vars(two.critic.module.scale) == vars(one.critic.module.scale)
    a, b = (engine.step(prompts(8, seed=1)).metrics for engine in (one, two))
    assert all(a[k] == b[k] for k in a if not k.startswith(("time/", "perf/")))


@pytest.mark.parametrize("standardize", ["norm", "scale", "return", "none"])
def test_units_are_those_of_the_shaped_scores(standardize: str) -> None:
    moments = RunningMoments().with_scores(torch.tensor([1.0, 5.0, 9.0]))
    config = RewardConfig(standardize=standardize)
    units = units_of(moments, config)
    assert (
        units
        == {"norm": Units(5.0, 4.0), "scale": Units(0.0, 4.0), "return": Units(0.0, 4.0), "none": RAW}[standardize]
    )
    x = torch.tensor([1.0, 5.0, 9.0])
    assert torch.equal(moved(x, RAW, RAW), x)
    torch.testing.assert_close(moved(x, RAW, units), (x - units.mean) / units.std)
    torch.testing.assert_close(moved(moved(x, RAW, units), units, RAW), x)


def test_explained_variance_sees_a_bias() -> None:
    returns = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 5, returns) < -10
    assert explained_variance(returns.mean().expand(100), returns) == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(returns, torch.ones(100)) == 0.0


def test_monte_carlo_returns_do_not_ask_the_critic() -> None:
    engine = tiny_engine()
    experience = engine.experience(engine.rollout(prompts(8)))
    got = monte_carlo_returns(experience.rewards, experience.rollout, 0.9, "ref")
    cu = experience.rollout.response_cu.tolist()
    for start, end in itertools.pairwise(cu):
        want = 0.0
        for t in reversed(range(start, end)):
            want = float(experience.rewards[t]) + 0.9 * want
            assert float(got[t]) == pytest.approx(want, abs=1e-5)


def test_a_policy_and_its_critic_of_one_start_are_apart() -> None:
    """The head's length is taken out of the critic's copy, not of the reward model."""
    reward = tiny_reward()
    before = reward.score.weight.detach().clone()
    engine = tiny_engine(policy=tiny_policy(), reward=reward)
    assert torch.equal(engine.reward_model.score.weight, before)
    assert float(engine.critic.module.score.weight.detach().norm()) == pytest.approx(1.0)
