"""The pictures of a report: one small SVG each, as a data URI for an <img>. One style, no pyplot state."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#2563a8", "#d4622a", "#2b8a5f", "#8455b5", "#b0912a", "#c23b6d")
"""One a run, in the order given."""
PHASES = {
    "time/rollout": ("rollout", "#5b8fc7"),
    "time/experience": ("experience", "#a9c4e4"),
    "time/update": ("update", "#1f4e85"),
}
SMOOTH_FROM = 20
"""Steps from which a curve is drawn as its moving mean over the raw line."""
LEAST_RANGE = 0.3
"""Of a panel's height, as a share of the start's level, so that noise does not look like a collapse."""
STYLE = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "ppomax",
}


@dataclass
class Curve:
    """One run's line in a panel."""

    steps: Sequence[float]
    values: Sequence[float]
    colour: str
    low: Sequence[float] = ()
    """Lower edge of the band around it; empty: no band."""
    high: Sequence[float] = ()
    marks: Sequence[int] = field(default_factory=tuple)
    """Steps of alarms, drawn as dashed verticals."""


def curve_panel(
    curves: Sequence[Curve],
    *,
    limits: Sequence[float] = (),
    start: float | None = None,
    floor: float | None = None,
    x: str = "step",
) -> str:
    """Lines over steps; `limits`: dotted horizontals where the alarm's thresholds lie, each drawn if it is near the
    data; `start`: a thin line at the start's level, which the panel's height is at least LEAST_RANGE of; `floor`:
    nothing below it is shown."""

    def draw(axes: Any) -> None:
        for curve in curves:
            _draw_curve(axes, curve)
        low, high = axes.get_ylim()
        if start is not None:
            lacking = max(0.0, LEAST_RANGE * abs(start) - (high - low)) / 2
            low, high = low - lacking, high + lacking
            axes.set_ylim(low, high)
            axes.axhline(start, color=FAINT, linewidth=0.6)
        if floor is not None and low < floor:
            axes.set_ylim(bottom=floor)
        for limit in limits:
            if low - 0.5 * (high - low) <= limit <= high + 0.5 * (high - low):
                axes.axhline(limit, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xlabel(x)
        axes.locator_params(axis="x", integer=True)
        axes.margins(x=0.01)

    return _picture(draw, (3.5, 1.9))


def _draw_curve(axes: Any, curve: Curve) -> None:
    n = len(curve.steps)
    if len(curve.low):
        band = [moving_mean(x, max(5, n // 40)) if n >= SMOOTH_FROM else x for x in (curve.low, curve.high)]
        axes.fill_between(curve.steps, *band, color=curve.colour, alpha=0.13, linewidth=0)
    alone = {"marker": "o", "markersize": 3} if n == 1 else {}
    if n < SMOOTH_FROM:
        axes.plot(curve.steps, curve.values, color=curve.colour, linewidth=1.5, **alone)
    else:
        axes.plot(curve.steps, curve.values, color=curve.colour, linewidth=0.6, alpha=0.3)
        axes.plot(curve.steps, moving_mean(curve.values, max(5, n // 40)), color=curve.colour, linewidth=1.5)
    for step in curve.marks:
        axes.axvline(step, color=curve.colour, linewidth=0.9, linestyle=(0, (3, 3)))


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the newest `width` finite values at each place."""
    out = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i + 1 - width) : i + 1] if math.isfinite(v)]
        out.append(sum(window) / len(window) if window else math.nan)
    return out


def histogram(groups: Sequence[tuple[str, Sequence[float], str]], span: tuple[float, float], bins: int = 28) -> str:
    """Distributions of scores on shared bins over `span`: (label, scores, colour) each, as shares of the responses."""
    low, high = span
    width = (high - low) / bins or 1.0
    edges = [low + i * width for i in range(bins + 1)]

    def draw(axes: Any) -> None:
        for label, scores, colour in groups:
            counts = [0] * bins
            for x in scores:
                counts[min(bins - 1, int((x - low) / width))] += 1
            shares = [100 * c / len(scores) for c in counts]
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.28, linewidth=0)
            axes.stairs(shares, edges, color=colour, linewidth=1.4, label=label)
        axes.set_xlabel("score")
        axes.set_ylabel("% of responses")
        axes.legend(frameon=False, fontsize=7.5, labelcolor=INK)

    return _picture(draw, (4.6, 2.2))


def phase_bars(runs: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Mean seconds a step by phase, one stacked bar a run."""

    def draw(axes: Any) -> None:
        for row, (_, times) in enumerate(runs):
            left = 0.0
            for metric, (label, colour) in PHASES.items():
                seconds = times.get(metric, 0.0)
                axes.barh(row, seconds, left=left, height=0.55, color=colour, label=label if row == 0 else None)
                left += seconds
            axes.annotate(f"{left:.2f} s", (left, row), (6, 0), textcoords="offset points", va="center", color=INK)
        axes.set_yticks(range(len(runs)), [name for name, _ in runs], color=INK)
        axes.set_ylim(len(runs) - 0.4, -0.6)
        axes.set_xlabel("seconds a step, mean")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        axes.legend(frameon=False, fontsize=7.5, labelcolor=INK, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))

    return _picture(draw, (7.4, 0.9 + 0.42 * len(runs)))


def _picture(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode("ascii")
