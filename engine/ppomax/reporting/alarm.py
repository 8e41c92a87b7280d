"""Collapse alarm: signs that a run leaves the healthy state that it starts in.

    start = mean over step 1, where policy and start model are equal, and those of the first `alarm_baseline_steps` that
            follow it at once with a KL below alarm_kl / 5: a collapse in the first steps is not taken for health
    now   = mean over the newest `alarm_window` steps
    (a) length      now > 2 x start or < start / 2, or the truncated share rose by more than alarm_truncated
    (b) entropy     entropy or response NLL < alarm_entropy x start
    (c) kl          KL per token > alarm_kl, or doubled in 50 steps and above alarm_kl / 2 (not in a run's first 50
                    after the baseline, where every KL doubles from near 0)
    (d) perplexity  under the start model, now > 3 x start or < start / 3
    (e) held_out    the judge of `monitor.eval_every` finds the policy worse than the start, the 95 % interval of its
                    win rate below one half, while the training score is above the start's
Two of these raise the alarm, and so does a KL above 4 x alarm_kl by itself. Rewards and losses do not show a
collapse (Secrets of RLHF I, section 5). More signs are named by a report but raise nothing: the scores' right tail,
distinct bigrams, a drift of perplexity, a useless critic.
A pure function of the metrics of a run so far, so a resumed run and a report see what the run saw."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ppomax.config import MonitorConfig

DOUBLING_STEPS = 50
LENGTH_FACTOR = 2.0
PERPLEXITY_FACTOR = 3.0
"""Of the responses' perplexity under the start model, up or down."""
KL_ALONE = 4.0
"""Multiple of alarm_kl that needs no second sign."""
KL_HEALTHY = 0.2
"""Multiple of alarm_kl below which a step of the first ones counts as the healthy state."""
TAIL_FACTOR = 2.0
"""Growth of p99 - p50 of the scores that counts as a long right tail."""
DRIFT = 0.3
"""Relative change of perplexity and fall of distinct-2 that counts as drift."""
COUNTED = ("length", "entropy", "kl", "perplexity", "held_out")
KL, ENTROPY, LENGTH, TRUNCATED = "objective/kl_per_token", "policy/entropy_avg", "rollout/length", "rollout/truncated"
PERPLEXITY, REF_PERPLEXITY, DISTINCT = "rollout/perplexity", "rollout/ref_perplexity", "rollout/distinct_2"
SCORES, WIN_RATE_HIGH = "objective/scores", "eval/win_rate_high"
P50, P99, EXPLAINED = "objective/scores_p50", "objective/scores_p99", "val/explained_var"


@dataclass(frozen=True)
class Sign:
    """One sign that holds at a step."""

    kind: str
    """`length`, `entropy`, `kl`, `perplexity` or `held_out`, which count for the alarm; or `tail`, `distinct`, `drift`
    or `critic`."""
    metric: str
    """The metric that shows it."""
    text: str
    """What is seen, with the start's and the present figure."""

    @property
    def counted(self) -> bool:
        """Whether it counts for the alarm."""
        return self.kind in COUNTED


@dataclass
class CollapseAlarm:
    """Feed it each step's metrics: `signs` are those that hold now, `raised` says whether they are enough."""

    config: MonitorConfig
    signs: list[Sign] = field(default_factory=list)
    raised: bool = False

    def __post_init__(self) -> None:
        self._first: list[dict[str, float]] = []
        self._steps = 0
        self._healthy = True
        """Whether steps still count as the start."""
        self._window: deque[dict[str, float]] = deque(maxlen=self.config.alarm_window)
        self._kl: deque[float] = deque(maxlen=DOUBLING_STEPS)

    def update(self, metrics: dict[str, float]) -> bool:
        """Take one step's metrics; True if the alarm is raised by this step (it was not before)."""
        before = self.raised
        self._window.append(metrics)
        self._steps += 1
        now = means(self._window)
        self._healthy &= self._steps <= self.config.alarm_baseline_steps
        self._healthy &= self._steps == 1 or not metrics.get(KL, 0.0) >= KL_HEALTHY * self.config.alarm_kl
        if self._healthy:
            self._first.append(metrics)
        self.signs = []
        if len(self._window) == self.config.alarm_window:
            start = means(self._first)
            counted = [*self._length(start, now), *self._entropy(start, now), *self._kl_signs(now)]
            self.signs = [*counted, *_under_the_start(start, now), *_held_out(start, now)]
        if self._steps > self.config.alarm_baseline_steps:
            self.signs += further(means(self._first), now)
            self._kl.extend([now[KL]] if KL in now else [])
        alone = bool(self.signs) and now.get(KL, 0.0) > KL_ALONE * self.config.alarm_kl
        self.raised = alone or len({sign.kind for sign in self.signs if sign.counted}) >= 2
        return self.raised and not before

    def _length(self, start: dict[str, float], now: dict[str, float]) -> Iterable[Sign]:
        if _both(LENGTH, start, now) and _far(now[LENGTH], start[LENGTH], LENGTH_FACTOR):
            yield Sign("length", LENGTH, f"mean length {now[LENGTH]:.1f} tokens, {start[LENGTH]:.1f} at the start")
        if _both(TRUNCATED, start, now) and now[TRUNCATED] > start[TRUNCATED] + self.config.alarm_truncated:
            yield Sign(
                "length", TRUNCATED, f"{now[TRUNCATED]:.0%} of responses truncated, {start[TRUNCATED]:.0%} at the start"
            )

    def _entropy(self, start: dict[str, float], now: dict[str, float]) -> Iterable[Sign]:
        share = self.config.alarm_entropy
        if _both(ENTROPY, start, now) and now[ENTROPY] < share * start[ENTROPY]:
            yield Sign("entropy", ENTROPY, f"entropy {now[ENTROPY]:.2f} nats, {start[ENTROPY]:.2f} at the start")
        if _both(PERPLEXITY, start, now) and math.log(now[PERPLEXITY]) < share * math.log(start[PERPLEXITY]):
            yield Sign(
                "entropy",
                PERPLEXITY,
                f"NLL of own responses {math.log(now[PERPLEXITY]):.2f} nats a token, "
                f"{math.log(start[PERPLEXITY]):.2f} at the start",
            )

    def _kl_signs(self, now: dict[str, float]) -> Iterable[Sign]:
        limit = self.config.alarm_kl
        if KL not in now:
            return
        if now[KL] > limit:
            yield Sign("kl", KL, f"KL {now[KL]:.3f} nats a token, over {limit:g}")
        elif len(self._kl) == DOUBLING_STEPS and now[KL] > limit / 2 and now[KL] > 2 * min(self._kl):
            yield Sign(
                "kl",
                KL,
                f"KL {now[KL]:.3f} nats a token, doubled within {DOUBLING_STEPS} steps from {min(self._kl):.3f}",
            )


def _under_the_start(start: dict[str, float], now: dict[str, float]) -> Iterable[Sign]:
    if _both(REF_PERPLEXITY, start, now) and _far(now[REF_PERPLEXITY], start[REF_PERPLEXITY], PERPLEXITY_FACTOR):
        yield Sign("perplexity", REF_PERPLEXITY, _perplexities(start, now))


def _held_out(start: dict[str, float], now: dict[str, float]) -> Iterable[Sign]:
    if now.get(WIN_RATE_HIGH, 1.0) < 0.5 and _both(SCORES, start, now) and now[SCORES] > start[SCORES]:
        yield Sign(
            "held_out",
            WIN_RATE_HIGH,
            f"win rate over the start at most {now[WIN_RATE_HIGH]:.0%} on held-out prompts, while the training score "
            f"rose from {start[SCORES]:.2f} to {now[SCORES]:.2f}",
        )


def _perplexities(start: dict[str, float], now: dict[str, float]) -> str:
    return f"perplexity under the start model {now[REF_PERPLEXITY]:.1f}, {start[REF_PERPLEXITY]:.1f} at the start"


def _far(now: float, start: float, factor: float) -> bool:
    return now > factor * start or now < start / factor


def further(start: dict[str, float], now: dict[str, float]) -> Iterable[Sign]:
    """Signs that do not count for the alarm."""
    if all(_both(m, start, now) for m in (P50, P99)):
        tail, was = now[P99] - now[P50], start[P99] - start[P50]
        if was > 0 and tail > TAIL_FACTOR * was:
            yield Sign("tail", P99, f"right tail of the scores (p99 - p50) {tail:.2f}, {was:.2f} at the start")
    if _both(DISTINCT, start, now) and now[DISTINCT] < (1 - DRIFT) * start[DISTINCT]:
        yield Sign("distinct", DISTINCT, f"distinct bigrams {now[DISTINCT]:.2f}, {start[DISTINCT]:.2f} at the start")
    drifted = _both(REF_PERPLEXITY, start, now) and abs(now[REF_PERPLEXITY] / start[REF_PERPLEXITY] - 1) > DRIFT
    if drifted and not _far(now[REF_PERPLEXITY], start[REF_PERPLEXITY], PERPLEXITY_FACTOR):
        yield Sign("drift", REF_PERPLEXITY, _perplexities(start, now))
    if EXPLAINED in now and now[EXPLAINED] < 0:
        yield Sign("critic", EXPLAINED, f"the critic explains nothing: explained variance {now[EXPLAINED]:.2f}")


def means(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the rows that have it, as finite numbers."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def thresholds(metric: str, start: dict[str, float], config: MonitorConfig) -> list[float]:
    """Values of a metric beyond which it is a sign of collapse by itself, for a run with this start."""
    level = start.get(metric)
    if metric == KL:
        return [config.alarm_kl, KL_ALONE * config.alarm_kl]
    if level is None:
        return []
    return {
        LENGTH: [level / LENGTH_FACTOR, level * LENGTH_FACTOR],
        TRUNCATED: [level + config.alarm_truncated],
        ENTROPY: [level * config.alarm_entropy],
        REF_PERPLEXITY: [level / PERPLEXITY_FACTOR, level * PERPLEXITY_FACTOR],
    }.get(metric, [])


@dataclass(frozen=True)
class History:
    """What went wrong in a run, in order."""

    first: list[tuple[int, Sign]]
    """The first step at which each (kind, metric) showed, oldest first."""
    alarms: list[int]
    """Steps at which the alarm was raised."""


def history(rows: Iterable[dict[str, Any]], config: MonitorConfig) -> History:
    """Replay the rows of metrics.jsonl (PPO steps alone) through the alarm."""
    alarm, seen, first, alarms = CollapseAlarm(config), set(), [], []
    for row in rows:
        if row["step"] < 1:
            continue
        if alarm.update(row):
            alarms.append(int(row["step"]))
        for sign in alarm.signs:
            if (sign.kind, sign.metric) not in seen:
                seen.add((sign.kind, sign.metric))
                first.append((int(row["step"]), sign))
    return History(first, alarms)


def _both(metric: str, start: dict[str, float], now: dict[str, float]) -> bool:
    return metric in start and metric in now
