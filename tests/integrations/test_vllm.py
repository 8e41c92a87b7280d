"""vLLM as the sampler of a rollout, on its CPU build: `bench/rivals.sh vllm` makes an environment for it."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ppomax.assets import shipped
from ppomax.config import RolloutConfig, TrainConfig
from ppomax.engine import Engine
from ppomax.models import load_policy, load_tokenizer
from ppomax.rollout import Sampling, decode
from ppomax.rollout.vllm_sampler import SamplerError, VllmSampler
from ppomax.sharding.weights import lazy_weights

from tests.engine.tiny import EOS, prompts, small_config, tiny_engine, tiny_policy

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm: not installed; bench/rivals.sh vllm", allow_module_level=True)

GAP = 1e-3
"""Mean distance of vLLM's logprobs from the scored ones, float32 on CPUs."""


@pytest.fixture(scope="module")
def policy() -> Any:
    return load_policy(shipped("policy")).eval()


@pytest.fixture(scope="module")
def sampler(policy) -> Iterator[VllmSampler]:
    made = VllmSampler(policy, RolloutConfig(sampler="vllm"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def heads() -> list[list[int]]:
    tokenizer = load_tokenizer(shipped("policy"))
    return [tokenizer(text)["input_ids"] for text in ("the film", "a good", "it is", "one of the")]


def greedily(sampler: VllmSampler, policy: Any, heads: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    how: dict[str, Any] = {"eos_ids": [load_tokenizer(shipped("policy")).eos_token_id]}
    theirs = sampler.sample(heads, range(len(heads)), Sampling(24, temperature=0.0), **how)
    ours = decode(policy, heads, range(len(heads)), Sampling(24, temperature=0.0), **how)
    return theirs.tokens, ours.tokens


def test_what_is_sent_is_received_and_drawn_from(sampler, policy, heads) -> None:
    """The hash of the first hand-over is compared in `take`; then the weights move, and vLLM moves with them."""
    sampler.take(lazy_weights(policy))
    assert sampler.verified
    before, ours = greedily(sampler, policy, heads)
    assert before == ours
    with torch.no_grad():
        for x in policy.parameters():
            x.mul_(1.05)
    sampler.take(lazy_weights(policy))
    after, ours = greedily(sampler, policy, heads)
    assert after == ours != before


def test_draws_are_named_by_seed_and_uid(sampler, heads) -> None:
    one, same, other = (
        sampler.sample(heads, range(4), Sampling(16, seed=seed), eos_ids=[]).tokens for seed in (1, 1, 2)
    )
    assert one == same != other
    assert all(len(r) == 16 for r in one)


@pytest.mark.parametrize(
    "knobs",
    [{}, {"model__train": "lora"}, {"model__train": "hydra", "model__trained_layers": 1}],
    ids=["full", "lora", "hydra"],
)
def test_a_run_goes_on_as_ours_would(knobs, heads) -> None:
    config = small_config(rollout__sampler="vllm", loss__sampler_is_cap=2.0, impl="auto", **knobs)
    engine = Engine(load_policy(shipped("policy")), None, None, str(shipped("reward_model")), config)
    for _ in range(5):
        metrics = engine.step(heads * 2).metrics
        assert metrics["rollout/logprob_gap_mean"] < GAP
        assert metrics["val/first_ratio_gap"] == 0
        assert metrics["val/skipped"] == 0
    assert engine.outside is not None
    engine.outside.sampler.close()


def test_the_next_buffer_is_drawn_while_this_one_is_trained_on(heads) -> None:
    config = small_config(rollout__sampler="vllm", rollout__ahead=1, loss__sampler_is_cap=2.0, impl="auto")
    engine = Engine(load_policy(shipped("policy")), None, None, str(shipped("reward_model")), config)
    gaps = []
    for step in range(4):
        gaps.append(
            engine.step(heads * 2, following=heads * 2 if step < 3 else None).metrics["rollout/logprob_gap_mean"]
        )
    assert gaps[0] < GAP < min(gaps[1:])
    assert engine.outside is not None
    engine.outside.sampler.close()


def test_sampling_that_is_cut_has_the_logprobs_of_what_was_left(sampler, policy, heads) -> None:
    sampler.take(lazy_weights(policy))
    given = sampler.sample(heads, range(4), Sampling(16, top_k=3, temperature=0.7), eos_ids=[])
    for prompt, response, logprobs in zip(heads, given.tokens, given.logprobs, strict=True):
        with torch.no_grad():
            z = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / 0.7
        z = z.masked_fill(z < z.topk(3).values[:, -1:], -torch.inf).log_softmax(-1)
        want = z.gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs).double(), want, rtol=0, atol=1e-3)


def test_a_process_that_dies_is_named_with_its_last_words() -> None:
    made = VllmSampler(tiny_policy(), RolloutConfig(sampler="vllm"))
    made.take(lazy_weights(tiny_policy()))
    os.kill(made._child.pid, signal.SIGKILL)  # type: ignore[union-attr]
    with pytest.raises(SamplerError, match=r"vLLM's process ended \(status -9\)\. Its last words:"):
        made.sample(prompts(2), range(2), Sampling(4), eos_ids=[EOS])


def test_a_process_that_does_not_answer_is_ended() -> None:
    made = VllmSampler(tiny_policy(), RolloutConfig(sampler="vllm", sampler_timeout=2.0))
    with pytest.raises(SamplerError, match=r"did not answer for rollout.sampler_timeout=2 seconds, and was ended"):
        made.take(lazy_weights(tiny_policy()))
    assert made._child.wait(20) is not None  # type: ignore[union-attr]


def test_what_vllm_refuses_is_told_in_its_words() -> None:
    made = VllmSampler(tiny_policy(), RolloutConfig(sampler="vllm"))
    with pytest.raises(SamplerError, match="vLLM failed:"):
        made.sample([[5] * 5000], [0], Sampling(4), eos_ids=[EOS])


def test_the_engine_makes_it_from_its_configuration() -> None:
    config: TrainConfig = small_config(rollout__sampler="vllm")
    engine: Engine = tiny_engine(config)
    assert engine.outside is not None
    assert isinstance(engine.outside.sampler, VllmSampler)
