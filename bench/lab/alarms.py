"""The collapse alarm held against the judge: which runs it was raised in, and how early.

A run has collapsed where the judge prefers the start in the end (win rate over the last two evaluations below 0.4), and
is healthy where it does not and its score is not below the start's; others are in between and count for neither. Each
run's own series are replayed through the alarm as it is now, the truncated share as the held-out responses of the last
evaluation before show it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ppomax.config import MonitorConfig
from ppomax.reporting.alarm import ENTROPY, KL, LENGTH, REF_PERPLEXITY, SCORES, TRUNCATED, history

from bench.lab.verdicts import Runs

SERIES = {"kl": KL, "entropy": ENTROPY, "perplexity": REF_PERPLEXITY, "train_length": LENGTH, "score": SCORES}
LOST, KEPT = 0.4, 0.5
"""Win rates in the end of a collapsed run at most, and of a healthy one at least."""


class Outcome(NamedTuple):
    """One run by judge and alarm."""

    arm: str
    seed: int
    kind: str
    """`collapsed`, `healthy` or `between`."""
    raised: int | None
    """Step of the first alarm."""
    seen: int | None
    """First evaluation at which the judge's win rate lies below one half with its 95 % interval."""


def outcomes(runs: Runs, config: MonitorConfig | None = None) -> list[Outcome]:
    """Of every run that the judge has read."""
    found = []
    for (arm, seed), row in runs.items():
        if row.get("win"):
            alarms = history(replayed(row), config or MonitorConfig()).alarms
            found.append(Outcome(arm, seed, kind_of(row), alarms[0] if alarms else None, seen_at(row)))
    return found


def kind_of(row: dict[str, Any]) -> str:
    win, gold = (sum(row[name][-2:]) / 2 for name in ("win", "gold"))
    if win < LOST:
        return "collapsed"
    return "healthy" if win >= KEPT and gold >= row["gold"][0] else "between"


def seen_at(row: dict[str, Any], prompts: int = 71) -> int | None:
    """prompts: how many each evaluation has."""
    for step, win in zip(row["eval_steps"], row["win"], strict=True):
        if win + 1.96 * math.sqrt(win * (1 - win) / prompts) < 0.5:
            return int(step)
    return None


def replayed(row: dict[str, Any]) -> list[dict[str, float]]:
    """A run's series as rows of its metrics."""
    rows = []
    for i in range(len(row["kl"])):
        ended = [f for s, f in zip(row["eval_steps"], row["finished"], strict=True) if s <= i + 1]
        named = {metric: row[name][i] for name, metric in SERIES.items()}
        rows.append({"step": i + 1, **named, TRUNCATED: 1 - ended[-1]})
    return rows


def summary(found: list[Outcome]) -> str:
    """Markdown: a line for the seeds that thresholds were chosen on, one for the others."""
    lines = ["| seeds | collapsed runs raised | before the judge saw it | healthy runs raised |", "|---|---|---|---|"]
    for name, seeds in (("0, 1: thresholds were chosen here", (0, 1)), ("2, 3", (2, 3))):
        lost = [o for o in found if o.seed in seeds and o.kind == "collapsed"]
        kept = [o for o in found if o.seed in seeds and o.kind == "healthy"]
        early = sum(o.raised is not None and (o.seen is None or o.raised <= o.seen) for o in lost)
        raised = [sum(o.raised is not None for o in part) for part in (lost, kept)]
        lines.append(f"| {name} | {raised[0]} of {len(lost)} | {early} of {len(lost)} | {raised[1]} of {len(kept)} |")
    return "\n".join(lines)
