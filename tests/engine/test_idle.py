"""Models that lie on the host between their phases: what a phase needs is there, the rest is not, and nothing of the
run changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.config import ConfigError
from ppomax.sharding.idle import Idle, tensors_of
from ppomax.stages.pretrain_critic import pretrain_critic

from tests.engine.tiny import prompts, small_config, tiny_engine

LORA: dict[str, Any] = {"model__train": "lora", "model__lora_rank": 4}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "bfloat16": {"model__dtype": "bfloat16"},
    "lora": LORA,
    "critic on the reward model": {**LORA, "model__critic_train": "lora"},
    "critic on the policy": {**LORA, "model__critic_train": "lora", "model__critic": "policy"},
    "hydra": {"model__train": "hydra", "model__trained_layers": 1, "model__critic": "trunk"},
}


class Away:
    """Stands for a host: what is sent there is not a number until it is brought back."""

    def __init__(self) -> None:
        self.there: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.log: list[int] = []

    def send(self, x: torch.Tensor) -> None:
        if id(x) not in self.there and x.is_floating_point():
            self.there[id(x)] = (x, x.data)
            x.data = torch.full_like(x.data, float("nan"))

    def bring(self, x: torch.Tensor) -> None:
        if id(x) in self.there:
            x.data = self.there.pop(id(x))[1]

    def holds(self, model: Any) -> bool:
        """Whether all numbers of a model lie here."""
        return all(id(x) in self.there for x in tensors_of(model) if x.is_floating_point())


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    place = Away()
    monkeypatch.setattr(Idle, "send", lambda self, x: place.send(x))
    monkeypatch.setattr(Idle, "bring", lambda self, x: place.bring(x))
    return place


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_the_same_to_the_bit(mode: str, away: Away) -> None:
    found = []
    for idle in ("device", "host"):
        engine = tiny_engine(small_config(sharding__idle=idle, critic_optim__warmup=0.0, **MODES[mode]))
        steps = [engine.step(prompts(8)) for _ in range(3)]
        _, scores = engine.preview(prompts(4))
        found.append(([numbers(s.metrics) for s in steps], [s.scores.tolist() for s in steps], scores.tolist()))
    assert found[0] == found[1]
    assert away.there, "nothing was ever sent away"


def test_each_phase_has_what_it_works_with_alone(away: Away) -> None:
    engine = tiny_engine(small_config(sharding__idle="host"))
    models = {"reference": engine.reference, "reward": engine.reward_model, "critic": engine.critic}

    def there() -> set[str]:
        return {name for name, model in models.items() if not away.holds(model)}

    seen = {}
    real = engine.idle.work_with

    def work_with(*names: str) -> None:
        real(*names)
        seen[names] = there()

    engine.idle.work_with = work_with  # type: ignore[method-assign]
    for _ in range(2):
        engine.step(prompts(8))
    assert seen == {
        (): set(),
        ("reference", "critic"): {"reference", "critic"},
        ("reward",): {"reward"},
        ("critic",): {"critic"},
    }
    assert len(tensors_of(engine.critic)) > 3 * len(list(engine.critic.module.parameters())), "no optimiser state"


def test_a_checkpoint_is_read_while_models_are_away(away: Away, tmp_path: Path) -> None:
    engine = tiny_engine(small_config(sharding__idle="host"))
    engine.step(prompts(8))
    engine.save(tmp_path / "step")
    want = engine.step(prompts(8))
    other = tiny_engine(small_config(sharding__idle="host"))
    other.idle.work_with()
    other.idle.work_with("critic")
    other.restore(tmp_path / "step")
    got = other.step(prompts(8))
    assert numbers(got.metrics) == numbers(want.metrics)


def test_a_critic_is_pretrained_where_it_computes(away: Away) -> None:
    losses = []
    for idle in ("device", "host"):
        engine = tiny_engine(small_config(sharding__idle=idle))
        metrics, _ = pretrain_critic(engine, prompts(8))
        losses.append(metrics["pretrain/value_loss"])
    assert losses[0] == losses[1]


def test_cut_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="moves whole models"):
        tiny_engine(small_config(sharding__idle="host", sharding__zero_stage=3))
