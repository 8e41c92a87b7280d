"""Evaluation while training: held-out prompts from the same random streams each time, judged against the start's."""

from __future__ import annotations

import pytest
from ppomax.assets import shipped
from ppomax.assets.sources import run_sources
from ppomax.config import ConfigError, MonitorConfig, load_config
from ppomax.data import PromptRow
from ppomax.reporting.alarm import CollapseAlarm
from ppomax.reporting.page import closing_words
from ppomax.saving.jsonl import read_rows
from ppomax.stages.evaluate import wilson
from ppomax.stages.held_out import Given, HeldOut, judge_function, judge_name
from ppomax.stages.ppo import train_ppo

from tests.engine.test_monitor import HEALTHY
from tests.engine.tiny import SMALL, prompts, small_config, tiny_assets, tiny_engine, tiny_tokenizer


def held_out(judge: object = None) -> HeldOut:
    engine = tiny_engine(small_config(), tokenizer=tiny_tokenizer())
    return HeldOut(engine, Given(prompts(8), {}), judge, [])


def test_a_policy_ties_with_its_own_start() -> None:
    evaluation = held_out()
    first, second = evaluation.metrics(), evaluation.metrics()
    assert first == second
    assert first["eval/win_rate"] == 0.5
    assert (first["eval/win_rate_low"], first["eval/win_rate_high"]) == wilson(0.5, 8)
    assert first["eval/kl_per_token"] == 0.0
    assert len(evaluation.start) == 8


def test_it_leaves_no_trace_and_sees_the_policy_move() -> None:
    evaluation, alone = held_out(), tiny_engine(small_config(), tokenizer=tiny_tokenizer())
    evaluation.metrics()
    for i in range(2):
        a, b = (e.step(prompts(8, seed=i)).metrics for e in (evaluation.engine, alone))
        assert all(a[k] == b[k] for k in a if not k.startswith(("time/", "perf/")))
    after = evaluation.metrics()
    assert after["eval/kl_per_token"] > 0


def test_a_judge_of_ones_own_compares_prompt_by_prompt() -> None:
    calls: list[int] = []

    def judge(given: list[str], responses: list[str], finished: list[bool]) -> list[float]:
        calls.append(len(responses))
        return [float(len(calls)) if i % 4 else 0.0 for i in range(len(responses))]

    evaluation = held_out(judge)
    assert evaluation.metrics()["eval/win_rate"] == 0.5
    metrics = evaluation.metrics()
    assert metrics["eval/win_rate"] == (6 + 0.5 * 2) / 8
    assert metrics["eval/judge"] == 2.0 * 6 / 8
    assert calls == [8, 8]


def test_the_shipped_classifier_reads_the_whole_text() -> None:
    judge = judge_function("classifier", tiny_tokenizer())
    found = judge(["a"] * 2, ["b"] * 2, prompt_ids=[[1, 5], [1, 6]], response_ids=[[7], [8]])
    assert len(found) == 2
    assert judge_function("reward", tiny_tokenizer()) is None


def test_columns_for_reward_and_judge() -> None:
    rows = [PromptRow([1], {"prompt": "a", "answer": 1, "hint": None}), PromptRow([2], {"prompt": "b", "answer": 2})]
    given = Given.of(rows, lambda p, r, answer: [], lambda p, r, finished, hint=0: [])
    assert given == Given([[1], [2]], {"answer": [1, 2]})
    assert Given.of(rows, None, None).columns == {}
    assert Given.of(rows, lambda p, r, **k: []).columns == {"prompt": ["a", "b"], "answer": [1, 2]}
    assert given.at([1, 1]) == Given([[2], [2]], {"answer": [2, 2]})
    with pytest.raises(ConfigError, match=r"takes 'hint', which row 1 of the prompts has not \(2 of 2 rows"):
        Given.of(rows, lambda p, r, hint: [])


def test_a_run_evaluates_before_between_and_after_and_resumes_with_its_start(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assets = tiny_assets(tmp_path)
    knobs = {**SMALL, **assets, "monitor.eval_every": 2, "monitor.eval_prompts": 5, "run.checkpoint_every": 1}
    knobs |= {"run.steps": 3, "monitor.tensorboard": False}
    train_ppo(load_config(overrides={**knobs, "run.out": str(tmp_path / "whole")}))
    rows = {r["step"]: r for r in read_rows(tmp_path / "whole" / "metrics.jsonl") if r["step"]}
    assert [s for s, r in rows.items() if "eval/win_rate" in r] == [2, 3]
    cut = load_config(overrides={**knobs, "run.out": str(tmp_path / "cut"), "run.steps": 2})
    train_ppo(cut)
    train_ppo(load_config(overrides={**knobs, "run.out": str(tmp_path / "cut"), "run.resume": True}))
    again = {r["step"]: r for r in read_rows(tmp_path / "cut" / "metrics.jsonl") if r["step"]}
    for name in (k for k in rows[3] if k.startswith("eval/")):
        assert again[3][name] == rows[3][name], name


def test_held_out_prompts_are_evaluated_at_both_ends_unasked(tmp_path) -> None:  # type: ignore[no-untyped-def]
    knobs = {**SMALL, **tiny_assets(tmp_path), "run.steps": 3, "monitor.tensorboard": False, "run.checkpoint_every": 1}
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "w5 w6"}\n{"prompt": "w7"}\n', encoding="utf-8")

    def rows(name: str, **more: object) -> dict[int, dict[str, float]]:
        out = tmp_path / name
        train_ppo(load_config(overrides={**knobs, "run.out": str(out), **more}))
        return {r["step"]: r for r in read_rows(out / "metrics.jsonl") if "eval/win_rate" in r}

    named = {"data.eval_prompts": str(tmp_path / "held_out.jsonl")}
    asked = rows("asked", **named)
    assert list(asked) == [3]
    assert "win rate over the start, held-out prompts" in closing_words(tmp_path / "asked")
    assert not rows("off", **named, **{"monitor.eval_prompts": 0})
    assert not rows("none")
    rows("begun without", **{"run.steps": 2})
    assert not rows("begun without", **named, **{"run.resume": True})  # the start's responses were not judged


def test_the_shipped_prompts_are_judged_by_the_shipped_classifier() -> None:
    run = load_config()
    assert run_sources(run).eval_prompts == str(shipped("held_out_prompts.jsonl"))
    assert judge_name(None, run_sources(run).eval_prompts) == "classifier"
    assert judge_name(None, "mine.jsonl") == judge_name(None, "") == "reward"
    assert judge_name("f.py:f", run_sources(run).eval_prompts) == "f.py:f"
    own = load_config(overrides={"data.prompts": "mine.jsonl"})
    assert run_sources(own).eval_prompts == ""


def test_a_judge_that_finds_the_policy_worse_is_a_sign_of_its_own() -> None:
    def run(high: float, entropy: float) -> CollapseAlarm:
        alarm = CollapseAlarm(MonitorConfig())
        for step in range(1, 31):
            late = {"objective/scores": 2.0, "eval/win_rate_high": high, "policy/entropy_avg": entropy}
            alarm.update({**HEALTHY, **(late if step > 12 else {})})
        return alarm

    assert [s.kind for s in run(0.4, 2.0).signs if s.counted] == ["held_out"]
    assert not run(0.4, 2.0).raised
    assert run(0.4, 0.5).raised
    assert not run(0.6, 0.5).raised
