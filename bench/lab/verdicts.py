"""What the runs say of a claim: the mean over seeds of a difference, its 95 % interval, and one of three words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from bench.lab.grid import Claim, Figure, GridError, Term
from bench.results import put_between

Runs = dict[tuple[str, int], dict[str, Any]]
BEGIN, END = "<!-- table: bench/results/lab -->", "<!-- end lab -->"
LEAST = 4
"""Seeds below which nothing is said."""
AGREES, DISAGREES, UNKNOWN, MISSING = "agrees", "does not", "cannot tell", "not run"


class Verdict(NamedTuple):
    """A claim held against the runs."""

    figure: Figure
    claim: Claim
    word: str
    mean: float
    low: float
    high: float
    seeds: int
    left: float
    """Mean over the seeds of the claim's left side."""
    right: float
    """And of its right side."""


def value(row: dict[str, Any], term: Term) -> float:
    """The measure of one run at a place: the first or the last twelfth of its series, the end (last third), early
    (first third), max, min. GridError: there is no such measure or place."""
    series = row.get(term.measure)
    if not isinstance(series, list) or not series:
        raise GridError(f"a run of {term.arm} has no measure {term.measure!r}")
    few, third = max(1, len(series) // 12), max(1, len(series) // 3)
    places = {
        "start": series[:few],
        "early": series[:third],
        "end": series[-third:],
        "last": series[-few:],
        "max": [max(series)],
        "min": [min(series)],
    }
    if term.at not in places:
        raise GridError(f"no place {term.at!r} in a run; there are {', '.join(places)}")
    return float(sum(places[term.at]) / len(places[term.at]))


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t; one value has an infinite one."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread
    return mean, mean - half, mean + half


def verdict(figure: Figure, claim: Claim, runs: Runs) -> Verdict:
    """`agrees` where the interval of left - right lies wholly on the claim's side (within its margin for `=`), `does
    not` where it lies wholly on the other, else `cannot tell`; seeds are paired."""
    arms = {claim.left.arm} | ({claim.right.arm} if isinstance(claim.right, Term) else set())
    seeds = [s for s in sorted({s for _, s in runs}) if all(_has(runs, a, s, claim) for a in arms)]
    if len(seeds) < LEAST:
        nothing = math.nan
        return Verdict(figure, claim, MISSING, nothing, nothing, nothing, len(seeds), nothing, nothing)
    left = [value(runs[claim.left.arm, s], claim.left) for s in seeds]
    right = [
        value(runs[claim.right.arm, s], claim.right) if isinstance(claim.right, Term) else claim.right for s in seeds
    ]
    mean, low, high = interval([a - b for a, b in zip(left, right, strict=True)])
    if claim.sign == "=":
        inside, outside = -claim.within <= low and high <= claim.within, low > claim.within or high < -claim.within
    else:
        inside, outside = (low > 0, high < 0) if claim.sign == ">" else (high < 0, low > 0)
    word = AGREES if inside else DISAGREES if outside else UNKNOWN
    return Verdict(figure, claim, word, mean, low, high, len(seeds), sum(left) / len(left), sum(right) / len(right))


def _has(runs: Runs, arm: str, seed: int, claim: Claim) -> bool:
    terms = [t for t in (claim.left, claim.right) if isinstance(t, Term) and t.arm == arm]
    return (arm, seed) in runs and all(runs[arm, seed].get(t.measure) for t in terms)


def verdicts(figures: list[Figure], runs: Runs) -> list[Verdict]:
    """Of every claim of these figures."""
    return [verdict(figure, claim, runs) for figure in figures for claim in figure.claims]


def table(found: list[Verdict]) -> str:
    """Markdown, a line a claim."""
    lines = ["| figure | the paper says | as a test | left, right, difference [95 %] | seeds | verdict |"]
    lines.append("|---|---|---|---|---|---|")
    for v in found:
        sides = f"{v.left:.3g}, {v.right:.3g}, {v.mean:+.3g} [{v.low:+.2g}, {v.high:+.2g}]"
        sides = "" if v.word == MISSING else sides
        lines.append(f"| {v.figure.number} | {v.claim.says} | `{v.claim.test}` | {sides} | {v.seeds} | {v.word} |")
    return "\n".join(lines)


def into(readme: Path, words: str) -> None:
    """Put the table between the marks of a file. GridError: it has none."""
    try:
        put_between(readme, BEGIN, END, words)
    except ValueError as error:
        raise GridError(str(error)) from error
