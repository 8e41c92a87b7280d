"""Scores and what is made of them: sources that fail loudly, shaping, KL controllers."""

import json
import math
import sys
from dataclasses import asdict

import pytest
import torch
from ppomax.config import ConfigError, KLConfig, load_config
from ppomax.integrations.rewards import from_trl, from_verl
from ppomax.recipe.moments import RunningMoments
from ppomax.recipe.rewards import (
    KLController,
    RewardError,
    call_reward,
    finite_scores,
    load_function,
    shape_scores,
    wanted_by,
)
from ppomax.stages.ppo import train_ppo

from tests.engine.tiny import SMALL, prompts, small_config, tiny_assets, tiny_engine, tiny_policy, tiny_tokenizer


def function_engine(function):
    return tiny_engine(small_config(model__critic="policy"), reward=function, tokenizer=tiny_tokenizer())


def test_function_reward_sees_texts_and_its_scores_arrive() -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def count_words(asked: list[str], given: list[str]) -> list[float]:
        seen.append((asked, given))
        return [float(len(r.split())) for r in given]

    engine = function_engine(count_words)
    experience = engine.experience(engine.rollout(prompts(8)))
    roll = experience.rollout
    asked, given = seen[0]
    tokenizer = tiny_tokenizer()
    assert asked == [tokenizer.decode(p[1:]) for p in prompts(8)]
    assert given == [tokenizer.decode(r, skip_special_tokens=True) for _, r in roll.sequences()]
    assert experience.scores.tolist() == [len(g.split()) for g in given]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, r: 1 / 0, "reward function <lambda> raised ZeroDivisionError"),
        (lambda p, r: [1.0] * (len(r) - 1), r"gave scores of shape \(7,\) for 8 responses"),
        (lambda p, r: [1.0] * (len(r) - 1) + [math.nan], "gave nan for response 7"),
        (lambda p, r: [math.inf] * len(r), "gave inf for response 0"),
        (lambda p, r: ["good"] * len(r), "must return one number for each response"),
        (lambda p, r: None, "must return one number for each response"),
        (lambda p, r: 1.0, r"shape \(\) for 8 responses"),
        (lambda p, r: [[1.0]] * len(r), "gave 1 rewards for response 0, which has"),
        (lambda p, r: torch.zeros(len(r), 2), r"shape \(8, 2\) for 8 responses"),
        (lambda p, r: iter([1.0] * len(r)), "must return one number for each response"),
        (lambda p, r: sys.exit(0), r"raised SystemExit: 0 \(.*test_rewards\.py:\d+\)"),
        (lambda p, r: json.loads("{"), r"raised .*JSONDecodeError: .* \(.*test_rewards\.py:\d+\)"),
        (lambda p, r: (_ for _ in ()).throw(KeyError("x")), r"raised KeyError: 'x' \(.*test_rewards\.py:\d+\)"),
    ],
)
def test_bad_reward_functions_are_named(function, message: str) -> None:
    engine = function_engine(function)
    with pytest.raises(RewardError, match=message):
        engine.experience(engine.rollout(prompts(8)))


def test_reward_model_is_read_at_the_last_token() -> None:
    engine = tiny_engine()
    roll = engine.rollout(prompts(8))
    scores = engine.reward(roll).total
    for i, (p, r) in enumerate(roll.sequences()):
        ids = torch.tensor(p + r)
        alone = engine.reward_model.scores(ids, torch.tensor([0, len(ids)], dtype=torch.int32))
        torch.testing.assert_close(scores[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_load_function(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def f(prompts, responses):\n    return [3.0 for _ in responses]\n", encoding="utf-8")
    assert load_function(f"{path}:f")([], ["a"]) == [3.0]
    assert load_function("math:sqrt") is math.sqrt
    for spec in (f"{path}:g", f"{tmp_path}/none.py:f", "no_such_module_xyz:f", "justaname"):
        with pytest.raises(RewardError, match=r"reward\.function"):
            load_function(spec)


@pytest.mark.parametrize("body", ["import sys; sys.exit(0)", "def f(:", "f = 3", "raise ValueError('no')", "1 / 0"])
def test_a_module_that_fails_is_named(tmp_path, body: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(body + "\n", encoding="utf-8")
    with pytest.raises(RewardError, match=r"reward\.function"):
        load_function(f"{path}:f")


def test_checked_scores_pass_through() -> None:
    x = torch.randn(4)
    assert finite_scores(x, "x") is x


def test_a_score_that_is_not_finite_is_named_with_its_prompt() -> None:
    with pytest.raises(RewardError, match=r"gave nan for response 1, to the prompt 'what' \(1 of 2"):
        call_reward(lambda p, r: [0.0, math.nan], ["who", "what"], ["a", "b"])


def test_a_reward_function_cannot_change_what_others_read() -> None:
    given = ["a", "b"]
    call_reward(lambda p, r: [float(len(r.pop())), 1.0], ["x", "y"], given)
    assert given == ["a", "b"]


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_the_adaptive_coefficient_stays_above_zero_however_many_sequences(kl: float) -> None:
    controller = KLController(KLConfig(controller="adaptive", coef=0.1, target=0.05, horizon=10))
    for sequences in (1, 10, 100, 100_000):
        before = controller.coef
        controller.update(kl, sequences)
        assert 0.8 <= controller.coef / before <= 1.2
        assert controller.coef > 0


@pytest.mark.parametrize(
    ("how", "want"), [("norm", [-1.0, 0.0, 1.0]), ("scale", [1.0, 2.0, 3.0]), ("none", [2.0, 4.0, 6.0])]
)
def test_standardising(how: str, want: list[float]) -> None:
    scores = torch.tensor([2.0, 4.0, 6.0])
    moments = RunningMoments().with_scores(scores)
    config = small_config(reward__standardize=how).reward
    torch.testing.assert_close(
        shape_scores(scores, torch.ones(3, dtype=torch.bool), moments, config), torch.tensor(want)
    )


@pytest.mark.parametrize("scores", [[5.0], [5.0, 5.0, 5.0]])
def test_equal_scores_stay_finite(scores: list[float]) -> None:
    moments = RunningMoments().with_scores(torch.tensor(scores))
    shaped = shape_scores(
        torch.tensor(scores), torch.ones(len(scores), dtype=torch.bool), moments, small_config().reward
    )
    assert shaped.tolist() == [0.0] * len(scores)


def test_moments_survive_a_round_trip() -> None:
    moments = RunningMoments().with_scores(torch.randn(9))
    assert RunningMoments(**json.loads(json.dumps(asdict(moments)))) == moments


def test_kl_controllers() -> None:
    fixed = KLController(small_config().kl)
    fixed.update(9.0, 100)
    assert fixed.coef == small_config().kl.coef
    config = small_config(kl__controller="adaptive", kl__target=0.1, kl__horizon=1000, kl__coef=1.0).kl
    high, low, near = (KLController(config) for _ in range(3))
    high.update(9.0, 100)
    low.update(-1.0, 100)
    near.update(0.11, 100)
    assert high.coef == pytest.approx(1 + 0.2 * 0.1)
    assert low.coef == pytest.approx(1 - 0.2 * 0.1)
    assert near.coef == pytest.approx(1 + 0.1 * 0.1)


def test_a_function_reward_needs_another_critic_and_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"model.critic is reward_model, but the reward is no model"):
        tiny_engine(reward=lambda p, r: [0.0], tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="tokenizer is needed"):
        tiny_engine(small_config(model__critic="policy"), reward=lambda p, r: [0.0])
    with pytest.raises(TypeError, match="reward must be a reward model"):
        tiny_engine(reward=3)


def test_reward_model_of_another_vocabulary_is_refused() -> None:
    from ppomax.models import make_reward_model

    other = tiny_policy()
    other.resize_token_embeddings(80)
    with pytest.raises(ValueError, match=r"the policy has 64 tokens, the .* has 80"):
        tiny_engine(reward=make_reward_model(other))


# ---- functions that know the row ------------------------------------------------------------------------------------


def test_a_function_gets_what_its_signature_names() -> None:
    seen: list[dict[str, object]] = []

    def named(prompts, responses, answer, *, level=0, finished):
        seen.append({"answer": answer, "level": level, "finished": finished})
        return [float(a in r) for a, r in zip(answer, responses, strict=True)]

    columns = {"answer": [f"w{i}" for i in range(4, 12)], "other": list(range(8))}
    engine = function_engine(named)
    roll = engine.rollout(prompts(8), columns)
    assert roll.columns == columns
    scores = engine.experience(roll).scores.tolist()
    texts = [tiny_tokenizer().decode(r, skip_special_tokens=True) for _, r in roll.sequences()]
    assert scores == [float(a in r) for a, r in zip(columns["answer"], texts, strict=True)]
    assert seen == [{"answer": columns["answer"], "level": 0, "finished": roll.finished.tolist()}]

    def anything(prompts, responses, **columns):
        seen.append(columns)
        return [0.0] * len(responses)

    engine = function_engine(anything)
    engine.step(prompts(8), columns)
    assert set(seen[-1]) == {"answer", "other", "prompt_ids", "response_ids", "finished"}
    assert seen[-1]["prompt_ids"] == prompts(8)
    engine.preview(prompts(2), {"other": [5, 6]})
    assert seen[-1]["other"] == [5, 6]


def test_columns_that_do_not_fit_are_named() -> None:
    engine = function_engine(lambda p, r, answer: [0.0] * len(r))
    with pytest.raises(RewardError, match=r"takes 'answer', which the data has not: its columns are \['finished'"):
        engine.experience(engine.rollout(prompts(8)))
    with pytest.raises(ValueError, match="column 'answer' has 3 entries for 8 prompts"):
        engine.rollout(prompts(8), {"answer": [1, 2, 3]})
    with pytest.raises(ValueError, match="column 'finished' has a name that reward functions get otherwise"):
        engine.rollout(prompts(8), {"finished": [True] * 8})


def test_a_builtin_without_a_signature_gets_prompts_and_responses() -> None:
    assert wanted_by(max) == ((), (), False)
    assert wanted_by(lambda p, r: []) == ((), (), False)


def test_a_function_in_the_form_of_trl() -> None:
    """As its documentation has them: keywords, with or without columns."""

    def reward_func(completions, ground_truth, **kwargs):
        assert set(kwargs) == {"prompts", "completion_ids", "prompt_ids", "other"}
        return [1.0 if c == g else 0.0 for c, g in zip(completions, ground_truth, strict=True)]

    def by_ids(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    columns = {"ground_truth": ["a", "x"], "other": [0, 0], "prompt_ids": [[1], [1]], "finished": [True, True]}
    columns |= {"response_ids": [[1, 2], [3]], "prompt": ["p", "q"]}
    assert call_reward(from_trl(reward_func), ["p", "q"], ["a", "b"], columns).total.tolist() == [1.0, 0.0]
    assert call_reward(from_trl(by_ids), ["p", "q"], ["a", "b"], columns).total.tolist() == [2.0, 1.0]
    assert from_trl(by_ids).__name__ == "by_ids"


def test_a_function_in_the_form_of_verl() -> None:
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        assert data_source == "sums"
        right = solution_str == ground_truth
        return {"score": 1.0, "acc": True} if right and extra_info else float(right)

    columns = {"data_source": ["sums"] * 2, "reward_model": [{"ground_truth": "4"}, {"ground_truth": "5"}]}
    columns |= {"extra_info": [{"index": 1}, {"index": 2}]}
    assert call_reward(from_verl(compute_score), ["2+2", "2+3"], ["4", "6"], columns).total.tolist() == [1.0, 0.0]
    with pytest.raises(RewardError, match="takes 'reward_model', which the data has not"):
        call_reward(from_verl(compute_score), ["2+2"], ["4"], {"data_source": ["sums"]})
    with pytest.raises(RewardError, match="reward_model must be a mapping with ground_truth"):
        call_reward(from_verl(compute_score), ["2"], ["4"], {"data_source": ["sums"], "reward_model": ["4"]})


def test_training_hands_each_row_to_the_function(tmp_path) -> None:
    """From a file, through shuffles and samples, each prompt keeps its own answer; missing ones are found at once."""
    assets = tiny_assets(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    rows = [{**row, "answer": row["prompt"][::-1]} for row in rows]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "f.py").write_text(
        "calls = []\n"
        "def f(prompts, responses, answer):\n"
        "    calls.append((prompts, answer))\n"
        "    assert [p[::-1] for p in prompts] == answer\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    knobs = {**SMALL, **assets, "reward.function": f"{tmp_path / 'f.py'}:f", "model.critic": "policy", "run.steps": 2}
    knobs |= {"run.out": str(tmp_path / "run"), "rollout.samples_per_prompt": 2, "monitor.samples_every": 1}
    knobs.pop("model.reward_model")
    train_ppo(load_config(overrides=knobs))
    path.write_text("".join(json.dumps(r if i else {"prompt": r["prompt"]}) + "\n" for i, r in enumerate(rows)))
    with pytest.raises(ConfigError, match=r"takes 'answer', which row 1 of the prompts has not \(1 of 12 rows"):
        train_ppo(load_config(overrides={**knobs, "run.out": str(tmp_path / "again")}))
