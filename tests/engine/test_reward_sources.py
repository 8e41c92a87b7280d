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
from ppomax.recipe.rewards import RewardError, call_reward, sequence_sums
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
    want = 0.5 * one.reward(roll).total - 2.0 * torch.tensor([float(len(t)) for t in texts]) + 2.0
    torch.testing.assert_close(two.reward(roll).total, want)
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
    assert call_reward(waits, ["a", "b"], ["c", "d"]).total.tolist() == [2.0, 2.0]
    with pytest.raises(RewardError, match=r"took longer than reward\.timeout=0\.05 s"):
        call_reward(waits, ["long"], ["c"], timeout=0.05)


def test_a_pool_gives_what_the_function_gives_and_stops_what_does_not_end(spec: str) -> None:
    answers, texts = [str(i) for i in range(7)], ["x0y", "", "2", "7", "44", "no", "6"]
    columns = {"answer": answers, "finished": [True, False] * 3 + [True]}
    pool = Pooled(f"{spec}answered", 2)
    want = [11.0, 0.0, 11.0, 0.0, 11.0, 0.0, 11.0]
    assert call_reward(pool, texts, texts, columns).total.tolist() == want
    assert call_reward(pool, texts[:1], texts[:1], {n: x[:1] for n, x in columns.items()}).total.tolist() == want[:1]
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


# ---- rewards token by token -----------------------------------------------------------------------------------------


def at_each(prompts, responses, response_ids):
    """A token earns 0.1 for an even id, and the last one 1 more."""
    return [[0.1 * (t % 2 == 0) + (i + 1 == len(ids)) for i, t in enumerate(ids)] for ids in response_ids]


def at_the_end(prompts, responses, response_ids):
    return [sum(row) for row in at_each(prompts, responses, response_ids)]


@pytest.mark.parametrize("standardize", ["norm", "scale", "none"])
def test_tokens_earn_their_own_and_a_response_as_much_as_ever(standardize: str) -> None:
    knobs = {"reward__standardize": standardize, "model__critic": "policy", "kl__coef": 0.0}
    one, two = (tiny_engine(small_config(**knobs), reward=f, tokenizer=tiny_tokenizer()) for f in (at_each, at_the_end))
    roll = one.rollout(prompts(8))
    each, end = one.experience(roll), two.experience(two.rollout(prompts(8)))
    torch.testing.assert_close(each.scores, end.scores)
    torch.testing.assert_close(each.shaped_scores, end.shaped_scores)
    sums = sequence_sums(each.rewards, roll.response_cu)
    torch.testing.assert_close(sums, each.shaped_scores)
    std = 1.0 if standardize == "none" else each.moments.std
    for (_, response), start, stop in zip(roll.sequences(), roll.response_cu, roll.response_cu[1:], strict=False):
        want = [0.1 * (t % 2 == 0) / std for t in response[:-1]]
        assert each.rewards[start : stop - 1].tolist() == pytest.approx(want, abs=1e-6)
    assert not torch.equal(each.advantages, end.advantages)


def test_a_response_may_have_one_number_beside_others_with_many() -> None:
    total, tokens = call_reward(
        lambda p, r: [[1.0, 2.0], 5], ["a", "b"], ["c", "d"], {"response_ids": [[7, 8], [9] * 3]}
    )
    assert total.tolist() == [3.0, 5.0]
    assert tokens is not None
    assert tokens.tolist() == [1.0, 2.0, 0.0, 0.0, 5.0]


def test_several_sources_are_added_token_by_token() -> None:
    engine = tiny_engine(reward=[(2.0, at_each), (1.0, length), (1.0, tiny_reward())], tokenizer=tiny_tokenizer())
    roll = engine.rollout(prompts(6))
    found, parts = engine.reward(roll), engine.reward.each(roll)
    torch.testing.assert_close(sequence_sums(found.tokens, roll.response_cu), found.total)
    ends = roll.response_cu[1:].long() - 1
    rest = 2.0 * parts["at_each"].tokens
    rest[ends] += parts["length"].total + parts["reward_model"].total
    torch.testing.assert_close(found.tokens, rest)


def test_processes_give_rewards_token_by_token(tmp_path: Path) -> None:
    (tmp_path / "g.py").write_text(
        "def f(prompts, responses, response_ids):\n    return [[1.0] * len(r) for r in response_ids]\n"
    )
    pool = Pooled(f"{tmp_path / 'g.py'}:f", 2)
    try:
        total, tokens = call_reward(pool, ["a"] * 3, ["b"] * 3, {"response_ids": [[1], [1, 2], [3] * 4]})
    finally:
        pool.close()
    assert total.tolist() == [1.0, 2.0, 4.0]
    assert tokens is not None
    assert len(tokens) == 7


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[1.0], [1.0]], "gave 1 rewards for response 1, which has 2 tokens"),
        ([[1.0]], "gave rewards of 1 responses for 2"),
        ([[1.0], "much"], "gave 'much' for response 1; a number or a list is wanted"),
        ([[1.0], [1.0, float("nan")]], "gave nan for response 1"),
    ],
)
def test_bad_rewards_of_tokens_are_named(given: object, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        call_reward(lambda p, r: given, ["a", "b"], ["c", "d"], {"response_ids": [[7], [8, 9]]})
