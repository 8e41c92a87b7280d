"""Win / tie / lose of one checkpoint against another on given prompts.

    both answer each prompt from the same random stream -> a judge compares -> win rate = (wins + ties / 2) / judged
with a 95 % Wilson interval, which for ties counted half is on the wide side. Two equal checkpoints tie everywhere.
Judges: a reward model, a Python function as in training, or an OpenAI-compatible endpoint (judges.py)."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppomax.assets import DEFAULT, named_model, named_prompts, shipped
from ppomax.config.mapping import to_dict
from ppomax.config.stages import EvaluateConfig
from ppomax.stages.judges import EndpointJudge, JudgeError, Judgement, compare_scores, endpoint_key
from ppomax.stages.sheet import write_sheet
from ppomax.stages.wilson import wilson

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """One checkpoint's response to one prompt."""

    prompt_ids: list[int]
    response_ids: list[int]
    prompt: str
    text: str
    whole: str
    """Prompt and response as one text."""
    finished: bool
    row: Mapping[str, Any] = field(default_factory=dict)
    """The prompt's, with its other columns."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome, seen from `policy`."""

    win: int
    tie: int
    lose: int
    unjudged: int
    """Prompts without a usable verdict; they are in no rate."""
    path: Path
    """evaluation.json, with a row a prompt."""
    positive: tuple[float, ...] | None = None
    """Shares of policy's and baseline's texts that the classifier calls positive, where it judged."""

    sheet: Path | None = None
    """The blind page, where one was asked for."""

    @property
    def win_rate(self) -> float:
        """(wins + ties / 2) / judged."""
        return (self.win + self.tie / 2) / (self.win + self.tie + self.lose)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the win rate."""
        return wilson(self.win_rate, self.win + self.tie + self.lose)

    def sentence(self) -> str:
        low, high = self.interval
        lost = f", {self.unjudged} not judged" if self.unjudged else ""
        if self.positive:
            lost += f"  called positive {self.positive[0]:.1%} against {self.positive[1]:.1%}"
        return (
            f"win {self.win}  tie {self.tie}  lose {self.lose}{lost}  win rate {self.win_rate:.1%} "
            f"(95 %: {low:.1%} to {high:.1%})\nwritten: {self.path}"
            + (
                f"\nsheet: {self.sheet}  (ppomax agreement {self.path.parent} ANSWERS... reads it)"
                if self.sheet
                else ""
            )
        )


def run_evaluation(config: EvaluateConfig) -> Evaluation:
    """Sample, judge, write evaluation.json. JudgeError if no prompt could be judged."""
    config = completed(config)
    judge = endpoint_judge(config) if config.judge == "endpoint" else None  # before sampling: its address may be wrong
    (ours, our_tokenizer), (theirs, their_tokenizer) = (
        answers(name, config) for name in (config.policy, config.baseline or "default")
    )
    prompts = [a.prompt for a in ours]
    if judge:
        judged = judge(prompts, [a.text for a in ours], [a.text for a in theirs])
    else:
        found = scores(ours, our_tokenizer, config), scores(theirs, their_tokenizer, config)
        judged = compare_scores(*found, config.tie_margin)
    counts = Counter(j.verdict for j in judged)
    if counts[None] == len(judged):
        raise JudgeError(
            f"evaluate: none of {len(judged)} prompts could be judged; the first reply was {judged[0].detail}"
        )
    out = Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-evaluate")
    out.mkdir(parents=True, exist_ok=True)
    positive = positive_shares(ours, theirs) if config.judge == "classifier" else None
    result = Evaluation(counts["win"], counts["tie"], counts["lose"], counts[None], out / "evaluation.json", positive)
    held = as_json(result, config, ours, theirs, judged)
    if config.sheet:
        result = replace(result, sheet=write_sheet(held, out, config.seed))
    result.path.write_text(json.dumps(held, indent=1), encoding="utf-8")
    return result


def completed(config: EvaluateConfig) -> EvaluateConfig:
    """`config` with the prompts and the baseline that it leaves to the run of `policy`, if that is one."""
    from ppomax.saving.engine_state import read_state
    from ppomax.saving.saved_policy import checkpoint_of

    checkpoint = checkpoint_of(Path(config.policy))
    state = read_state(checkpoint) if checkpoint else {}
    start, data = state.get("sources", {}).get("policy"), state.get("config", {}).get("data", {})
    found: dict[str, Any] = {"baseline": config.baseline or start or "default"}
    own = data.get("eval_prompts") or data.get("prompts")
    if config.prompts is None and own and own != DEFAULT:
        found |= {"prompts": own, "prompt_column": data["prompt_column"], "overlong": data["overlong"]}
        found["max_prompt_tokens"] = max(config.max_prompt_tokens, data["max_prompt_tokens"])
        log.info("prompts of the run: %s", own)
    return replace(config, **found)


def positive_shares(*sides: Sequence[Answer]) -> tuple[float, ...]:
    """Share of each side's texts that the shipped classifier calls positive, whoever may have written them."""
    from ppomax.assets.classifier import SentimentClassifier

    classifier = SentimentClassifier.load(shipped("classifier.json"))
    return tuple(classifier.positive_share([a.whole for a in side]) for side in sides)


def endpoint_judge(config: EvaluateConfig) -> EndpointJudge:
    """The endpoint of the configuration, with the key of the environment."""
    return EndpointJudge(
        str(config.endpoint),
        str(config.endpoint_model),
        config.criterion,
        endpoint_key(config.api_key_env),
        config.timeout,
        config.retries,
        workers=config.workers,
    )


def as_json(
    result: Evaluation,
    config: EvaluateConfig,
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    judged: Sequence[Judgement],
) -> dict[str, Any]:
    """What evaluation.json holds: the outcome, the configuration, and a row a prompt."""
    rows = [
        {"prompt": a.prompt, "policy": a.text, "baseline": b.text, "verdict": j.verdict, **j.detail}
        for a, b, j in zip(ours, theirs, judged, strict=True)
    ]
    return {
        "win": result.win,
        "tie": result.tie,
        "lose": result.lose,
        "unjudged": result.unjudged,
        "win_rate": result.win_rate,
        "win_rate_95": list(result.interval),
        "positive": result.positive,
        "config": to_dict(config),
        "rows": rows,
    }


def answers(checkpoint: str, config: EvaluateConfig) -> tuple[list[Answer], Any]:
    """This checkpoint's responses to the prompts, and its tokenizer."""
    from ppomax.data import load_prompt_rows
    from ppomax.models import pick_device
    from ppomax.models.checks import eos_ids_of
    from ppomax.rollout import Sampling, decode
    from ppomax.saving.saved_policy import open_policy

    model, tokenizer = open_policy(checkpoint, trust_remote_code=config.trust_remote_code)
    source = named_prompts(config.prompts or DEFAULT, held_out=True)
    limit, how = config.max_prompt_tokens, config.overlong
    read, _ = load_prompt_rows(source, tokenizer, limit, column=config.prompt_column, overlong=how)
    read = read[: config.limit or None]
    prompts = [r.tokens for r in read]
    sampling = Sampling(
        config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        slots=config.slots,
    )
    model = model.to(pick_device(config.device)).eval()  # type: ignore[arg-type]
    given = decode(model, prompts, range(len(prompts)), sampling, eos_ids=eos_ids_of(model, tokenizer))

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    rows = zip(read, given.tokens, given.finished, strict=True)
    return [Answer(list(p), r, text(p), text(r), text([*p, *r]), done, row) for (p, row), r, done in rows], tokenizer


def scores(given: Sequence[Answer], theirs: Any, config: EvaluateConfig) -> list[float]:
    """The judge's score of each answer; `theirs`: the tokenizer that the answers were made with."""
    if config.judge == "classifier":
        from ppomax.assets.classifier import SentimentClassifier

        classifier = SentimentClassifier.load(shipped("classifier.json"))
        return [classifier.score(a.whole) for a in given]
    if config.judge == "function":
        from ppomax.data import PromptRow, columns_of
        from ppomax.recipe.rewards import RESERVED, call_reward, load_function

        function = load_function(str(config.function))
        columns = columns_of([PromptRow(a.prompt_ids, a.row) for a in given])
        columns |= {name: [getattr(a, name) for a in given] for name in RESERVED}
        return call_reward(function, [a.prompt for a in given], [a.text for a in given], columns).total.tolist()
    from ppomax.data import Text, encode_prompt, encode_response
    from ppomax.models import freeze, load_reward_model, load_tokenizer, pick_device
    from ppomax.stages.reward_model import score_texts

    path = named_model(config.reward_model, "reward_model") if config.reward_model else str(shipped("reward_model"))
    model = load_reward_model(path, trust_remote_code=config.trust_remote_code)
    freeze(model.to(pick_device(config.device)))
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    same = tokenizer.get_vocab() == theirs.get_vocab()
    rows = []
    for a in given:
        prompt, response = a.prompt_ids, a.response_ids
        if not same:  # the judge reads the text by its own tokenizer; a response that was cut gets no end
            prompt, response = encode_prompt(a.prompt, tokenizer), encode_response(a.text, tokenizer)
            response = response if a.finished else response[:-1]
        rows.append(Text(prompt + response, len(prompt)))
    return [float(x) for x in score_texts(model, rows)]
