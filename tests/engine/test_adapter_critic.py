"""A critic of adapters on borrowed weights: starts as what it stands on, leaves that as it is, and learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.config import ConfigError, load_config
from ppomax.engine import Engine
from ppomax.models.adapter_critic import AdapterCritic
from ppomax.recipe.batch import pack
from ppomax.saving.model_folder import save_model

from tests.engine.families import family
from tests.engine.tiny import prompts, small_config, tiny_engine, tiny_reward, tiny_tokenizer

ON_REWARD: dict[str, Any] = {"model__critic_train": "lora", "model__lora_rank": 4}
ON_POLICY: dict[str, Any] = {**ON_REWARD, "model__critic": "policy", "model__train": "lora"}
BOTH = [ON_REWARD, ON_POLICY, {**ON_REWARD, "model__train": "lora"}]


def bits(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_its_first_values_are_the_reward_model_s() -> None:
    engine = tiny_engine(small_config(**ON_REWARD))
    tokens, cu_seqlens = pack([[1, 5, 6, 7], [1, 9, 3]])
    with torch.no_grad():
        got, want = engine.critic.module(tokens, cu_seqlens), engine.reward_model(tokens, cu_seqlens)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("knobs", BOTH)
def test_it_holds_adapters_and_a_head_alone_and_changes_nothing_else(knobs: dict[str, Any]) -> None:
    engine = tiny_engine(small_config(critic_optim__lr=1e-2, critic_optim__warmup=0.0, **knobs))
    critic = engine.critic.module
    assert isinstance(critic, AdapterCritic)
    assert sum(p.numel() for p in critic.parameters()) < 0.5 * sum(p.numel() for p in engine.policy.module.parameters())
    before, reward, base = bits(critic), bits(engine.reward_model), {
        n: p.detach().clone() for n, p in engine.policy.module.named_parameters() if not p.requires_grad
    }  # fmt: skip
    for _ in range(2):
        metrics = engine.step(prompts(8)).metrics
        assert metrics["val/first_ratio_gap"] == 0
        assert metrics["val/first_value_gap"] < 1e-6
    assert all(not torch.equal(p, q) for p, q in zip(critic.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(engine.reward_model.parameters(), reward, strict=True))
    now = dict(engine.policy.module.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in base.items())
    assert not any(m._forward_hooks for m in [*engine.policy.module.modules(), *engine.reward_model.modules()])


@pytest.mark.parametrize("knobs", BOTH)
def test_the_policy_learns_what_it_would_beside_another_critic(knobs: dict[str, Any]) -> None:
    """Policy gradients are the policy's alone: borrowing changes neither its forward nor its adapters' flags."""
    engine = tiny_engine(small_config(**knobs))
    experience = engine.experience(engine.rollout(prompts(8)))
    before = [p.requires_grad for p in engine.policy.module.parameters()]
    engine.update(experience)
    assert [p.requires_grad for p in engine.policy.module.parameters()] == before
    roll = engine.rollout(prompts(8))
    with torch.no_grad():
        values = engine.critic.module(roll.tokens, roll.cu_seqlens)
    torch.testing.assert_close(values[roll.states], roll.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_gradients_are_those_of_merged_weights(name: str) -> None:
    """Central differences of a value loss along random directions; the policy has adapters on the same layers."""
    knobs = small_config(**ON_POLICY)
    engine = Engine(family(name), None, None, tiny_reward(), knobs)
    critic = engine.critic.module
    with torch.no_grad():
        for p in critic.up:
            p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    tokens, cu_seqlens = pack([[1, 5, 6, 7, 3], [1, 9, 3]])

    def loss() -> torch.Tensor:
        return critic(tokens, cu_seqlens).square().sum()

    params = list(critic.parameters())
    gradients = torch.autograd.grad(loss(), params)
    directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(params)]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    ends = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for p, d in zip(params, directions, strict=True):
                p.add_(step * d)
            ends.append(loss())
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-3, slope, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("knobs", BOTH)
def test_recomputed_blocks_give_the_same_update(knobs: dict[str, Any]) -> None:
    found = []
    for again in (False, True):
        engine = tiny_engine(small_config(model__gradient_checkpointing=again, impl="ref", **knobs))
        for _ in range(2):
            engine.step(prompts(8))
        found.append(bits(engine.critic.module))
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize("knobs", BOTH)
def test_it_is_saved_and_goes_on_to_the_bit(knobs: dict[str, Any], tmp_path: Path) -> None:
    engine = tiny_engine(small_config(**knobs))
    engine.step(prompts(8))
    engine.save(tmp_path / "step")
    want = engine.step(prompts(8))
    other = tiny_engine(small_config(**knobs))
    other.restore(tmp_path / "step")
    got = other.step(prompts(8))
    assert torch.equal(got.scores, want.scores)
    assert all(torch.equal(p, q) for p, q in zip(bits(other.critic.module), bits(engine.critic.module), strict=True))


def test_it_may_stand_on_a_model_of_its_own(tmp_path: Path) -> None:
    path = str(save_model(tiny_reward(), None, tmp_path / "scorer"))
    engine = tiny_engine(small_config(model__critic=path, **ON_REWARD))
    assert engine.critic.module.base is not engine.reward_model.model
    assert engine.step(prompts(8)).metrics["val/skipped"] == 0


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"model.critic_train": "lora", "model.critic": "policy"}, "stands on the policy's frozen weights"),
        (
            {"model.critic_train": "lora", "model.critic": "trunk", "model.train": "hydra"},
            "critic=trunk is trained whole",
        ),
    ],
)
def test_what_it_cannot_stand_on_is_named(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(overrides=knobs)


def test_a_cut_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be whole on each rank"):
        tiny_engine(small_config(sharding__zero_stage=3, **ON_REWARD))


def test_without_a_reward_model_it_is_named() -> None:
    with pytest.raises(ValueError, match="the reward is no model"):
        tiny_engine(small_config(**ON_REWARD), reward=lambda p, r: [0.0] * len(r), tokenizer=tiny_tokenizer())
