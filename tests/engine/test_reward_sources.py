"""Rewards of several sources: their weighed sum, each one beside it; slow functions in processes, time limits."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import torch
from ppomax.config import ConfigError, RewardConfig, load_config
from ppomax.recipe.reward_pool import Pooled
from ppomax.recipe.reward_sources import SumReward, named_rewards
from ppomax.recipe.rewards import RewardError, call_reward
from ppomax.stages.ppo import train_ppo

from tests.engine.tiny import SMALL, prompts, small_config, tiny_assets, tiny_engine, tiny_reward, tiny_tokenizer

BODY = """
import asyncio, os, time
def length(prompts, responses):
    return [float(len(r)) for r in responses]
def answered(prompts, responses, answer, finished=None):
    return [float(a in r) + 10 * f for a, r, f in zip(answer, responses, finished)]
def acts(prompts, responses):
    if responses[0] == "sleep":
        time.sleep(60)
    if responses[0] == "die":
        os._exit(3)
    if responses[0] == "raise":
        raise KeyError("tea")
    return [float(os.getpid())] * len(responses)
async def waits(prompts, responses):
    await asyncio.sleep(0.01)
    return [float(len(p)) for p in prompts]
"""


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(r)) for r in responses]


async def waits(prompts: list[str], responses: list[str]) -> list[float]:
    await asyncio.sleep(30 if prompts == ["long"] else 0)
    return [2.0] * len(responses)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "f.py").write_text(BODY)
    return f"{tmp_path / 'f.py'}:"


def test_scores_of_several_sources_are_weighed_and_added() -> None:
    one, two = tiny_engine(tokenizer=tiny_tokenizer()), tiny_engine(
        reward=[(0.5, tiny_reward()), (-2.0, length), (1.0, waits)], tokenizer=tiny_tokenizer()
    )  # fmt: skip
    roll = one.rollout(prompts(6))
    texts = [str(two.tokenizer.decode(r, skip_special_tokens=True)) for _, r in roll.sequences()]
    want = 0.5 * one.reward(roll) - 2.0 * torch.tensor([float(len(t)) for t in texts]) + 2.0
    torch.testing.assert_close(two.reward(roll), want)
    assert isinstance(two.reward, SumReward)
    assert set(two.reward.each(roll)) == {"reward_model", "length", "waits"}
    metrics = two.step(prompts(6)).metrics
    parts = [metrics[f"objective/scores/{n}"] * w for n, w in (("reward_model", 0.5), ("length", -2), ("waits", 1))]
    assert metrics["objective/scores"] == pytest.approx(sum(parts), rel=1e-5)
    assert two.reward_model is not None
    assert not any(name.startswith("objective/scores/") for name in one.step(prompts(6)).metrics)


def test_bad_lists_of_rewards_are_named() -> None:
    for reward, error, words in (
        ([], ValueError, "reward is an empty list"),
        ([(1.0, tiny_reward()), (1.0, tiny_reward())], ValueError, "two reward models"),
        ([(1.0, 3)], TypeError, "got int"),
    ):
        with pytest.raises(error, match=words):
            tiny_engine(reward=reward, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"reward.functions": ["f.py:g"]}, r"reward\.functions must be WEIGHT\*file\.py:name each"),
        ({"reward.functions": ["nan*f.py:g"]}, r"reward\.functions"),
        ({"reward.functions": ["1*f.py:g"], "reward.function": "f.py:g"}, r"reward\.function must be null beside"),
        ({"reward.timeout": 0}, r"reward\.timeout must be above 0"),
    ],
)
def test_bad_knobs_are_named(knobs: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(overrides=knobs)


def test_what_the_knobs_name(spec: str) -> None:
    two = RewardConfig(functions=(f"1.5*{spec}length", f"-1*{spec}answered"))
    reward, functions = named_rewards(two, "somewhere")
    assert [(w, x if isinstance(x, str) else x.__name__) for w, x in reward] == [
        (1.0, "somewhere"), (1.5, "length"), (-1.0, "answered")
    ]  # fmt: skip
    assert [f.__name__ for f in functions] == ["length", "answered"]
    assert named_rewards(RewardConfig(), "somewhere") == ("somewhere", [])
    alone, _ = named_rewards(RewardConfig(function=f"{spec}length"), "")
    assert alone.__name__ == "length"
    with pytest.raises(ConfigError, match=r"reward\.timeout=3 cannot stop .*length in this process"):
        named_rewards(RewardConfig(function=f"{spec}length", timeout=3.0), "")
    named_rewards(RewardConfig(function=f"{spec}waits", timeout=3.0), "")
    assert not RewardConfig(functions=(f"1*{spec}length",), model_weight=0.0).uses_model


def test_an_async_function_is_awaited_and_held_to_its_time() -> None:
    assert call_reward(waits, ["a", "b"], ["c", "d"]).tolist() == [2.0, 2.0]
    with pytest.raises(RewardError, match=r"took longer than reward\.timeout=0\.05 s"):
        call_reward(waits, ["long"], ["c"], timeout=0.05)


def test_a_pool_gives_what_the_function_gives_and_stops_what_does_not_end(spec: str) -> None:
    answers, texts = [str(i) for i in range(7)], ["x0y", "", "2", "7", "44", "no", "6"]
    columns = {"answer": answers, "finished": [True, False] * 3 + [True]}
    pool = Pooled(f"{spec}answered", 2)
    want = [11.0, 0.0, 11.0, 0.0, 11.0, 0.0, 11.0]
    assert call_reward(pool, texts, texts, columns).tolist() == want
    assert call_reward(pool, texts[:1], texts[:1], {n: x[:1] for n, x in columns.items()}).tolist() == want[:1]
    pool.close()
    acts = Pooled(f"{spec}acts", 1)
    with pytest.raises(RewardError, match=r"acts raised KeyError: 'tea' \(.*f\.py:\d+\)"):
        call_reward(acts, ["p"] * 2, ["raise"] * 2)
    assert os.getpid() not in acts(["p"] * 2, ["where"] * 2)
    acts.timeout = 0.5
    with pytest.raises(RewardError, match=r"acts took longer than reward\.timeout=0\.5 s for 2 responses"):
        call_reward(acts, ["p"] * 2, ["sleep"] * 2)
    acts.timeout = None
    with pytest.raises(RewardError, match="a process of the reward function acts died"):
        call_reward(acts, ["p"] * 2, ["die"] * 2)


def test_a_run_of_a_model_and_two_functions_logs_each(spec: str, tmp_path: Path) -> None:
    assets = tiny_assets(tmp_path)
    path = tmp_path / "prompts.jsonl"
    rows = [{**json.loads(line), "answer": "a"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    knobs = {**SMALL, **assets, "run.steps": 1, "run.out": str(tmp_path / "run")}
    knobs["reward.functions"] = [f"0.1*{spec}length", f"2*{spec}answered"]
    out = train_ppo(load_config(overrides=knobs))
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"objective/scores/reward_model", "objective/scores/length", "objective/scores/answered"} <= last.keys()
    weighed = last["objective/scores/reward_model"] + 0.1 * last["objective/scores/length"]
    assert last["objective/scores"] == pytest.approx(weighed + 2 * last["objective/scores/answered"], rel=1e-5)


def test_knobs_reach_the_small_engine() -> None:
    assert small_config(reward__functions=["1*f.py:g"]).reward.terms == [(1.0, "f.py:g")]
