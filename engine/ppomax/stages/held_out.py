"""Evaluation while training: now and then responses to held-out prompts, from the same random streams each time, judged
against those of the start, prompt by prompt. A judge that is not the training reward shows what the reward does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ppomax_kernels as K
from transformers import PreTrainedTokenizerBase

from ppomax.assets import DEFAULT, named_prompts, shipped
from ppomax.config import ConfigError
from ppomax.data import PromptRow, columns_of
from ppomax.engine import Engine
from ppomax.recipe.rewards import RESERVED, FunctionReward, check_columns, load_function, wanted_by
from ppomax.stages.wilson import wilson

CLASSIFIER, REWARD = "classifier", "reward"


class Given(NamedTuple):
    """Prompts, and what a reward function gets of their rows."""

    prompts: list[list[int]]
    columns: dict[str, list[Any]]

    @classmethod
    def of(cls, rows: Sequence[PromptRow], *functions: Any) -> Given:
        """With the columns that these functions name, or all if one takes any; None is no function. ConfigError: one
        that is needed is missing, in all rows or in some."""
        wanted = [wanted_by(f) for f in functions if f is not None]
        names = dict.fromkeys(n for w in wanted for n in (*w.needed, *w.optional) if n not in RESERVED)
        for name in dict.fromkeys(n for w in wanted for n in w.needed if n not in RESERVED):
            without = [i for i, r in enumerate(rows) if r.row.get(name) is None]
            if without:
                raise ConfigError(
                    f"config: the reward function takes {name!r}, which row {without[0] + 1} of the prompts has not "
                    f"({len(without)} of {len(rows)} rows; columns {sorted(columns_of(rows))}); rename the column, or "
                    "give the argument a default"
                )
        columns = columns_of(rows, None if any(w.anything for w in wanted) else names)
        there = {k: v for k, v in columns.items() if any(x is not None for x in v)}
        return cls([r.tokens for r in rows], check_columns(there, len(rows)))

    def at(self, which: Sequence[int]) -> Given:
        """Those prompts, in that order."""
        columns = {name: [values[i] for i in which] for name, values in self.columns.items()}
        return Given([self.prompts[i] for i in which], columns)


def judge_name(wanted: str | None, prompts: str) -> str:
    """`monitor.eval_judge`, or what stands for it where it is None: an independent judge of film reviews on the prompts
    that it can judge."""
    return wanted or (CLASSIFIER if prompts == named_prompts(DEFAULT, held_out=True) else REWARD)


def judge_function(name: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What `monitor.eval_judge` names, as a reward function; None for the training reward itself."""
    if name == REWARD:
        return None
    if name != CLASSIFIER:
        return load_function(name)
    from ppomax.assets.classifier import SentimentClassifier

    found = SentimentClassifier.load(shipped("classifier.json"))

    def classifier(
        prompts: list[str], responses: list[str], prompt_ids: list[list[int]], response_ids: list[list[int]]
    ) -> list[float]:
        pairs = zip(prompt_ids, response_ids, strict=True)
        return [found.score(str(tokenizer.decode([*p, *r], skip_special_tokens=True))) for p, r in pairs]

    return classifier


class HeldOut:
    """The evaluation of one run; `start`: the judge's scores of the start policy, filled by the first call."""

    def __init__(self, engine: Engine, given: Given, judge: Any, start: list[float]):
        self.engine, self.given, self.start = engine, given, start
        self.judge = None if judge is None else FunctionReward(judge, engine.tokenizer)  # type: ignore[arg-type]

    def metrics(self) -> dict[str, float]:
        """Scores by reward and judge, the win rate over the start with its 95 % interval, KL and length."""
        roll, rewards = self.engine.preview(*self.given)
        judged = (rewards if self.judge is None else self.judge(roll).total).tolist()
        if not self.start:
            self.start[:] = judged
        wins = [0.5 + 0.5 * ((now > was) - (now < was)) for now, was in zip(judged, self.start, strict=True)]
        rate = sum(wins) / len(wins)
        low, high = wilson(rate, len(wins))
        kl = K.kl_penalty(roll.logprobs, roll.ref_logprobs, estimator="k3", impl=self.engine.config.impl)
        return {
            "eval/judge": sum(judged) / len(judged),
            "eval/reward": float(rewards.mean()),
            "eval/win_rate": rate,
            "eval/win_rate_low": low,
            "eval/win_rate_high": high,
            "eval/kl_per_token": float(kl.mean()),
            "eval/length": float(roll.lengths.float().mean()),
        }


def sentence(metrics: dict[str, float], judge: str, count: int) -> str:
    """For a log."""
    return (
        f"held out: win rate over the start {metrics['eval/win_rate']:.1%} (95 %: {metrics['eval/win_rate_low']:.1%} "
        f"to {metrics['eval/win_rate_high']:.1%}) of {count} prompts, by {judge}"
    )
