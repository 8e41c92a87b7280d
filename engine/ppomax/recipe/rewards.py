"""Where scores come from, and how a raw score becomes per-token rewards.

    rho = clip(standardise(R), -c, +c) - penalty * [no EOS] ;  r_t = -kl_coef * kl_t + [t = T] * rho
The KL penalty is added after the clip, so that no clip can hide it."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import ppomax_kernels as K
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppomax.config import AdvantageConfig, KLConfig, RewardConfig, TrainConfig
from ppomax.models import RewardModel
from ppomax.models.fused_trunk import fused_trunk
from ppomax.models.transfers import sent
from ppomax.recipe.batch import Rollout, last_tokens, per_token, spans, with_stand_in
from ppomax.recipe.moments import RunningMoments
from ppomax.sharding import call, ranks

if TYPE_CHECKING:
    from ppomax.sharding.zero import ZeroFrozen


class RewardError(RuntimeError):
    """A reward source failed: it raised, or gave the wrong number of scores, or NaN or infinity."""


class Scores(NamedTuple):
    """Raw scores of some sequences, higher is better."""

    total: Tensor
    """(S,) float32, of each whole response."""
    tokens: Tensor | None = None
    """(N,) float32, what each response token earns of it. None: the last one earns all."""


class RewardSource(Protocol):
    """Anything that scores the sequences of a rollout."""

    def __call__(self, rollout: Rollout) -> Scores: ...


class ModelReward:
    """The frozen reward model, read at each sequence's last token."""

    def __init__(self, model: RewardModel | ZeroFrozen[RewardModel], impl: str = "auto"):
        self.model, self.impl = model, impl

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Scores:
        scores = torch.zeros(len(rollout.finished), device=rollout.tokens.device)
        with fused_trunk(self.model, impl=self.impl):
            for micro in (m for minibatch in rollout.micro_batches for m in minibatch):
                which = with_stand_in(micro, rollout.on_host[0])
                at, cu = spans(rollout.on_host[0], which)
                found = call(self.model, RewardModel.scores, rollout.tokens[sent(at, scores.device)], cu)
                scores[sent(which, scores.device)] += float(len(micro) > 0) * found  # it may be here
        return Scores(finite_scores(ranks.sum(scores), "the reward model"))


RewardFunction = Callable[..., Sequence[float] | Sequence[Sequence[float]]]
"""f(prompts: list[str], responses: list[str], **columns) -> one number for each response, or a list of one number for
each of its tokens. By keyword it gets what its signature names of the data's columns and of RESERVED, all of it if it
takes `**anything`."""
RESERVED = ("prompt_ids", "response_ids", "finished")
"""Token ids of prompts and responses, and whether a response ended by itself (False: it was cut at the limit)."""


class FunctionReward:
    """A Python function of texts; each rank asks it about its own share."""

    def __init__(self, function: RewardFunction, tokenizer: PreTrainedTokenizerBase, timeout: float | None = None):
        self.function, self.tokenizer, self.timeout = function, tokenizer, timeout

    def __call__(self, rollout: Rollout) -> Scores:
        mine, device = ranks.part_of(len(rollout.finished)), rollout.tokens.device
        pairs = rollout.sequences()[mine.start : mine.stop]
        prompts, responses = texts_of(pairs, self.tokenizer)
        columns = {name: [values[i] for i in mine] for name, values in rollout.columns.items()}
        ended = rollout.finished.tolist()
        columns |= {"prompt_ids": [p for p, _ in pairs], "response_ids": [r for _, r in pairs]}
        columns["finished"] = [ended[i] for i in mine]
        total, tokens = torch.zeros(0), None
        if pairs:
            total, tokens = call_reward(self.function, prompts, responses, columns, self.timeout)
        total = ranks.gather(total.to(device))
        if not bool(ranks.max(torch.tensor(float(tokens is not None), device=device))):
            return Scores(total)
        tokens = torch.zeros(sum(len(r) for _, r in pairs)) if tokens is None else tokens  # none here: no pairs
        return Scores(total, ranks.gather(tokens.to(device)))


def texts_of(
    pairs: Sequence[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[str]]:
    """Prompts and responses as text, without special tokens."""
    prompts, responses = ([str(tokenizer.decode(p[i], skip_special_tokens=True)) for p in pairs] for i in (0, 1))
    return prompts, responses


class Wanted(NamedTuple):
    """What a reward function takes by keyword beside prompts and responses."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    anything: bool

    def of(self, columns: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Those of the columns; RewardError if one that is needed is not there."""
        missing = [n for n in self.needed if n not in columns]
        if missing:
            raise RewardError(
                f"{name} takes {missing[0]!r}, which the data has not: its columns are {sorted(columns) or 'none'}; "
                "rename the column or give the argument a default"
            )
        return {n: x for n, x in columns.items() if self.anything or n in self.needed or n in self.optional}


def wanted_by(function: RewardFunction) -> Wanted:
    """By its signature: what follows its first two arguments. Nothing of a function that has none to be read."""
    try:
        rest = list(inspect.signature(function).parameters.values())[2:]
    except (TypeError, ValueError):  # builtins
        return Wanted((), (), False)
    named = [p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Wanted(
        tuple(p.name for p in named if p.default is p.empty),
        tuple(p.name for p in named if p.default is not p.empty),
        any(p.kind is p.VAR_KEYWORD for p in rest),
    )


def check_columns(columns: Mapping[str, Sequence[Any]], count: int) -> dict[str, list[Any]]:
    """`columns` as lists of `count` entries each, none with a reserved name. ValueError names the one that is not."""
    for name, values in columns.items():
        if name in RESERVED:
            raise ValueError(f"column {name!r} has a name that reward functions get otherwise; rename it")
        if len(values) != count:
            raise ValueError(f"column {name!r} has {len(values)} entries for {count} prompts; give one for each")
    return {name: list(values) for name, values in columns.items()}


def call_reward(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    timeout: float | None = None,
) -> Scores:
    """`function(prompts, responses, **what it names of columns)` as float32 scores on the CPU; an async one is run to
    its end. RewardError: it raised (or called sys.exit), needs a column that is not there, gave something else than n
    finite numbers or lists of them, one for each of a response's `response_ids`, or, being async, took longer than
    `timeout` seconds."""
    given = run_function(function, prompts, responses, columns or {}, timeout)
    name = name_of(function)
    rows = [_numbers(x) for x in given] if isinstance(given, (list, tuple)) else []
    if not any(row is not None for row in rows):
        try:
            scores = torch.as_tensor(given, dtype=torch.float32, device="cpu").detach().to_dense()
        except Exception as error:  # by whatever types the function gave
            raise RewardError(f"{name} must return one number for each response, got {given!r:.80}") from error
        if scores.shape != (len(responses),):
            raise RewardError(
                f"{name} gave scores of shape {tuple(scores.shape)} for {len(responses)} responses; return exactly one "
                f"number each, shape ({len(responses)},)"
            )
        return Scores(finite_scores(scores, name, prompts))
    lengths = [len(ids) for ids in (columns or {}).get("response_ids", ())]
    tokens = _per_token(name, given, rows, lengths)
    total = torch.stack([x.sum() for x in tokens])
    return Scores(finite_scores(total, name, prompts), torch.cat(tokens))


def _numbers(given: Any) -> Tensor | None:
    """A list of numbers as (n,); None: it is something else, such as one number."""
    if not isinstance(given, (list, tuple)) and getattr(given, "ndim", 0) != 1:
        return None
    try:
        return torch.as_tensor(given, dtype=torch.float32, device="cpu").detach()
    except Exception:  # by whatever types the function gave
        return None


def _per_token(name: str, given: Sequence[Any], rows: Sequence[Tensor | None], lengths: Sequence[int]) -> list[Tensor]:
    """What each token of each response earns; a response with one number earns it at its end."""
    if len(rows) != len(lengths):
        raise RewardError(f"{name} gave rewards of {len(rows)} responses for {len(lengths)}; return a list for each")
    found = []
    for i, (row, value, length) in enumerate(zip(rows, given, lengths, strict=True)):
        if row is None:
            try:
                row = torch.nn.functional.pad(torch.tensor([float(value)]), (length - 1, 0))
            except (TypeError, ValueError):
                raise RewardError(f"{name} gave {value!r:.80} for response {i}; a number or a list is wanted") from None
        if row.shape != (length,):
            raise RewardError(
                f"{name} gave {row.numel()} rewards for response {i}, which has {length} tokens (response_ids); give "
                "one for each, or one number for all of it"
            )
        found.append(row)
    return found


def name_of(function: RewardFunction) -> str:
    """For a message."""
    return f"the reward function {getattr(function, '__name__', repr(function))}"


def run_function(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: Mapping[str, Sequence[Any]],
    timeout: float | None = None,
) -> Any:
    """What the function gives, as it gives it."""
    name = name_of(function)
    more = wanted_by(function).of(columns, name)
    grad = torch.is_grad_enabled()
    try:
        given = function(list(prompts), list(responses), **more)
        if inspect.isawaitable(given):
            given = asyncio.run(_awaited(given, timeout))
    except RewardError:
        raise
    except (Exception, SystemExit) as error:  # SystemExit would end training as if it were done
        raise RewardError(f"{name} raised {raised_where(error, function)}") from error
    finally:
        torch.set_grad_enabled(grad)
    return given


async def _awaited(given: Awaitable[Any], timeout: float | None) -> Any:
    try:
        async with asyncio.timeout(timeout):
            return await given
    except TimeoutError:
        raise RewardError(
            f"the reward function took longer than reward.timeout={timeout:g} s; make it faster, or raise that"
        ) from None


def raised_where(error: BaseException, function: Any) -> str:
    """`ValueError: words (file.py:12)`: the last line of the function's own file that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(getattr(function, "__code__", None), "co_filename", None)
    at = next((f for f in reversed(frames) if f.filename == own), frames[-1])
    words = " ".join(traceback.format_exception_only(error)[-1].split())  # also where str(error) fails
    return f"{words} ({at.filename}:{at.lineno})"


def finite_scores(scores: Tensor, name: str, prompts: Sequence[str] | None = None) -> Tensor:
    """`scores` if all are finite; RewardError names the source and the first bad entry, with its prompt if given."""
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        i = int(bad[0, 0])
        prompt = "" if prompts is None else f", to the prompt {prompts[i]!r:.80}"
        raise RewardError(
            f"{name} gave {float(scores[i])} for response {i}{prompt} ({len(bad)} of {len(scores)} are not finite)"
        )
    return scores


def load_function(spec: str) -> Callable[..., Any]:
    """`path/file.py:name` or `package.module:name` -> the function. Runs that file; RewardError if it is not there."""
    where, _, name = spec.rpartition(":")
    if not where:
        raise RewardError(f"reward.function must be file.py:name or package.module:name, got {spec!r}")
    try:
        if where.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(where).stem, where)
            if found is None or found.loader is None:
                raise ImportError(f"{where} is not a Python file")
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:  # whatever that file does
        raise RewardError(f"reward.function={spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise RewardError(f"reward.function={spec!r} is no function, but {type(function).__name__}")
    return function  # type: ignore[no-any-return]


class KLController:
    """The KL coefficient of the reward: fixed, or steered to a target (Ziegler et al., arXiv 1909.08593), by at most a
    fifth a buffer, as there, however many sequences it holds: so it stays above zero."""

    def __init__(self, config: KLConfig):
        self.config, self.coef = config, config.coef

    def update(self, kl: float, sequences: int) -> None:
        """kl: mean per token, nats, of the buffer that was just used; sequences: how many it held."""
        if self.config.controller == "adaptive":
            error = min(max(kl / self.config.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * min(sequences / self.config.horizon, 1)


def shape_scores(scores: Tensor, finished: Tensor, moments: RunningMoments, config: RewardConfig) -> Tensor:
    """(S,) raw scores -> standardised, clipped, less the missing-EOS penalty. `moments` already hold these scores."""
    if config.standardize == "norm":
        scores = (scores - moments.mean) / moments.std
    elif config.standardize in ("scale", "return"):
        scores = scores / moments.std
    if config.clip is not None:
        scores = scores.clamp(-config.clip, config.clip)
    return scores - (config.missing_eos_penalty or 0.0) * (~finished).float()


def judged_by(scores: Scores, roll: Rollout, config: TrainConfig) -> Tensor:
    """What the running moments of `reward.standardize` are taken over: the scores, or the returns that roll with
    them."""
    by_return = config.reward.standardize == "return"
    return rolling_returns(scores, roll, config.advantage.gamma) if by_return else scores.total


def rolling_returns(scores: Scores, roll: Rollout, gamma: float) -> Tensor:
    """(N,) discounted sums of what each response has earned up to each token: R_t = gamma * R_{t-1} + r_t, from 0 at
    its start. r: what the tokens earn, or the score at the last one; raw."""
    earned = scores.tokens
    if earned is None:
        ends = last_tokens(roll.response_cu)
        earned = torch.zeros(len(roll.states), device=scores.total.device).index_copy(0, ends, scores.total.float())
    backwards = earned.flip(0), roll.response_cu[-1] - roll.response_cu.flip(0)
    _, sums = K.gae(backwards[0], torch.zeros_like(earned), backwards[1], gamma=gamma, lam=1.0)
    return sums.flip(0)


def token_rewards(shaped: Tensor, rollout: Rollout, kl_coef: float, estimator: str, impl: str) -> Tensor:
    """(N,): -kl_coef * KL at each response token, the shaped score added at each last one. The estimator `vocabulary`
    is no estimate of the drawn token's logprobs, but `rollout.kl`."""
    if rollout.kl is not None:
        return (-kl_coef * rollout.kl).index_add(0, last_tokens(rollout.response_cu), shaped)
    return K.token_rewards(
        shaped,
        rollout.logprobs,
        rollout.ref_logprobs,
        rollout.response_cu,
        kl_coef=kl_coef,
        estimator=estimator,
        impl=impl,
    )


def spread(rewards: Tensor, tokens: Tensor, roll: Rollout, std: float) -> Tensor:
    """`token_rewards` with what each token earns, (N,) raw, given to it in units of `std`. The last token gets what is
    left of the shaped score, so that a response earns as much as without: what standardising, clipping and the
    missing-EOS penalty take or give, they take or give at the end."""
    ends = last_tokens(roll.response_cu)
    earlier = (tokens / std).index_fill(0, ends, 0.0)
    return (rewards + earlier).index_add(0, ends, -sequence_sums(earlier, roll.response_cu))


def advantages_and_returns(
    rewards: Tensor, roll: Rollout, config: AdvantageConfig, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(N,) advantages with the actor's lambda, (N,) returns with the critic's; then buffer-wide whitening and
    clipping, unless each minibatch does both by itself."""
    if config.bootstrap_truncated and roll.last_values is not None:
        # delta_T = r_T + gamma * V(s_{T+1}) - V(s_T): the value to come is a reward of the last token.
        to_come = config.gamma * roll.last_values * (~roll.finished).float()
        rewards = rewards.index_add(0, last_tokens(roll.response_cu), to_come)
    lam: float | Tensor = config.lam
    if config.length_alpha is not None:
        lam = (1 - 1 / (config.length_alpha * roll.lengths.float())).clamp(min=0.0)
    advantages, returns = K.gae(rewards, roll.values, roll.response_cu, gamma=config.gamma, lam=lam, impl=impl)
    critic_lam = config.lam if config.critic_lam is None else config.critic_lam
    if config.length_alpha is not None or critic_lam != config.lam:
        _, returns = K.gae(rewards, roll.values, roll.response_cu, gamma=config.gamma, lam=critic_lam, impl=impl)
    if config.over == "buffer":
        advantages = whitened_and_clipped(advantages, config, impl)
    return advantages, returns


def whitened_and_clipped(advantages: Tensor, config: AdvantageConfig, impl: str = "auto", group: Any = None) -> Tensor:
    """By the mean and std of these alone, or of those of all ranks of `group`."""
    if config.whiten:
        advantages = K.whiten(advantages, group=group, impl=impl)
    if config.clip is not None:
        advantages = advantages.clamp(-config.clip, config.clip)
    return advantages


def sequence_sums(x: Tensor, cu: Tensor) -> Tensor:
    """(N,) -> (S,): sum over each packed sequence."""
    owner = per_token(torch.arange(len(cu) - 1, device=x.device), cu)
    return torch.zeros(len(cu) - 1, dtype=x.dtype, device=x.device).index_add(0, owner, x)
