"""Runs that differ in nothing but their seed, drawn as one mean in a band."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ppomax.config.mapping import flat
from ppomax.reporting.plots import Curve
from ppomax.reporting.runs import Run

OWN = ("run.seed", "run.out", "run.resume")
"""Knobs in which the seeds of one configuration differ."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1 to 10 degrees of freedom; the last for more, which is on the wide side."""


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one configuration together, in the order of their first ones. A run without a configuration, or a seed
    that is there twice, is alone."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        knobs = flat(run.config)
        key = str(sorted((k, str(v)) for k, v in knobs.items() if k not in OWN)) if knobs else f"alone {id(run)}"
        while any(flat(other.config).get("run.seed") == knobs.get("run.seed") for other in found.get(key, [])):
            key += "'"
        found.setdefault(key, []).append(run)
    return list(found.values())


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves at the steps that all of them have, in the first one's colour, with `edges` as
    its band."""
    shared = sorted(set(curves[0].steps).intersection(*(c.steps for c in curves[1:])))
    by_step = [dict(zip(c.steps, c.values, strict=True)) for c in curves]
    means, low, high = [], [], []
    for step in shared:
        values = [c[step] for c in by_step]
        below, above = edges(values)
        means.append(statistics.fmean(values))
        low.append(below)
        high.append(above)
    marks = sorted({m for c in curves for m in c.marks})
    return Curve(shared, means, curves[0].colour, low, high, marks)


def edges(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of at least three values; two values themselves, whose interval would say
    nothing."""
    if len(values) == 2:
        return min(values), max(values)
    t, mean = T_95[min(len(values) - 1, len(T_95)) - 1], statistics.fmean(values)
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
