"""One HTML page of the laboratory: the verdicts, then each figure, its arms as means over seeds in 95 % bands."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from bench.lab.grid import Figure, Grid
from bench.lab.verdicts import Runs, interval, table, verdicts
from bench.page import STYLE, markdown_table, svg_of

LABELS = {
    "proxy": "training reward on held-out prompts",
    "gold": "gold judge's score",
    "win": "win rate over the start, by the gold judge",
    "kl": "KL a token (k3, nats)",
    "length": "tokens a response",
    "entropy": "entropy (nats a token)",
    "perplexity": "perplexity under the start model",
    "value_loss": "value loss",
    "policy_norm": "norm of the policy's gradient",
    "distinct": "distinct bigrams",
    "tax": "NLL of human text, before and after",
}
SMOOTHED = 5
"""Steps of the moving mean over series of single buffers of 32."""


def write(grid: Grid, runs: Runs, path: Path, numbers: list[str]) -> Path:
    """The page at `path`, and every figure beside it as `figure-<number>.png`."""
    figures = grid.chosen(numbers)
    parts = ["<h1>The paper's figures, on a small model</h1>", f"<p>{html.escape(conditions(grid, runs))}</p>"]
    parts.append("<h2>Verdicts</h2>" + markdown_table(table(verdicts(figures, runs))))
    path.parent.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        if set(figure.arms) <= {arm for arm, _ in runs}:
            parts.append(f"<h2>Figure {figure.number}: {html.escape(figure.title)}</h2>")
            parts.append(_both(draw(figure, runs), path.parent / f"figure-{figure.number}.png"))
    if any(row.get("gold") for row in runs.values()):
        parts.append("<h2>Over-optimisation: both rewards against the distance from the start</h2>")
        parts.append(_both(over_optimisation(runs), path.parent / "over-optimisation.png"))
    words = "".join(parts)
    path.write_text(f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{words}", encoding="utf-8")
    return path


def conditions(grid: Grid, runs: Runs) -> str:
    """Under what the runs were made, for the head of the page."""
    rows = list(runs.values())
    if not rows:
        return "No runs yet."
    machines, commits = sorted({r["machine"] for r in rows}), sorted({r["commit"] for r in rows})
    dates = sorted({r["date"] for r in rows})
    seconds = sum(r["seconds"] for r in rows)
    return (
        f"{len(rows)} runs of {len({a for a, _ in runs})} arms, seeds {sorted({s for _, s in runs})}, "
        f"{dates[0]} to {dates[-1]}, {seconds / 3600:.1f} core hours on {'; '.join(machines)}; "
        f"commits {', '.join(commits)}. python -m bench.lab run --figures NUMBER makes one figure's runs."
    )


def draw(figure: Figure, runs: Runs) -> Any:
    """A panel a measure, a line an arm."""
    pyplot = _pyplot()
    columns = min(3, len(figure.measures))
    height = -(-len(figure.measures) // columns)
    canvas, axes = pyplot.subplots(height, columns, figsize=(4.3 * columns, 3.1 * height), squeeze=False)
    for axis in axes.flat[len(figure.measures) :]:
        axis.set_visible(False)
    for axis, measure in zip(axes.flat, figure.measures, strict=False):
        for number, arm in enumerate(figure.arms):
            lines = [row for (a, _), row in runs.items() if a == arm and row.get(measure)]
            if lines:
                _band(axis, lines, measure, arm, f"C{number}")
        if measure == "win":
            axis.axhline(0.5, color="grey", linewidth=0.8)
        axis.set_title(LABELS.get(measure, measure), fontsize=9)
        axis.set_xlabel("after training: start, end" if measure == "tax" else "step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    canvas.tight_layout()
    return canvas


def _band(axis: Any, lines: list[dict[str, Any]], measure: str, arm: str, colour: str) -> None:
    """Mean over the runs and its 95 % interval."""
    at = places(lines[0], measure)
    series = [smoothed(row[measure]) if len(at) == row["steps"] else row[measure] for row in lines]
    found = [interval(list(values)) for values in zip(*series, strict=True)]
    means, lows, highs = zip(*found, strict=True)
    axis.plot(at, means, "o-" if len(at) < 20 else "-", color=colour, label=f"{arm} ({len(lines)})", markersize=3)
    if len(lines) > 1:
        axis.fill_between(at, lows, highs, color=colour, alpha=0.15, linewidth=0)


def places(row: dict[str, Any], measure: str) -> list[float]:
    """The steps at which a measure was taken."""
    count = len(row[measure])
    if count == row["steps"]:
        return [float(i + 1) for i in range(count)]
    if count == len(row["eval_steps"]):
        return [float(s) for s in row["eval_steps"]]
    return [float(i) for i in range(count)]


def smoothed(series: list[float]) -> list[float]:
    """The mean of each value and those before it, up to SMOOTHED of them."""
    return [sum(series[max(0, i + 1 - SMOOTHED) : i + 1]) / min(i + 1, SMOOTHED) for i in range(len(series))]


def over_optimisation(runs: Runs, arms: tuple[str, ...] = ("vanilla", "kl-0.05", "ppo-max", "ppo-max-long")) -> Any:
    """Proxy and gold against the square root of a response's KL, in standard deviations of the start's scores; a line a
    run."""
    pyplot = _pyplot()
    shown = [arm for arm in arms if any(a == arm and row.get("gold") for (a, _), row in runs.items())]
    canvas, axes = pyplot.subplots(
        1, max(1, len(shown)), figsize=(4.3 * max(1, len(shown)), 3.4), squeeze=False, sharey=True
    )
    for axis, arm in zip(axes.flat, shown, strict=False):
        for row in (row for (a, _), row in runs.items() if a == arm and row.get("gold")):
            distance = [kl_at(row, step) ** 0.5 for step in row["eval_steps"]]
            for name, colour in (("proxy", "C0"), ("gold", "C1")):
                start, spread = row[name][0], row[f"{name}_std"]
                gains = [(x - start) / spread for x in row[name]]
                label = {"proxy": "training reward", "gold": "gold judge"}[name] if row["seed"] == 0 else None
                axis.plot(distance, gains, "o-", color=colour, markersize=3, linewidth=1, alpha=0.8, label=label)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_title(arm, fontsize=10)
        axis.set_xlabel("sqrt(KL of a response, nats)", fontsize=8)
        axis.set_ylabel("gain, in standard deviations of the start", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    canvas.tight_layout()
    return canvas


def kl_at(row: dict[str, Any], step: int) -> float:
    """KL of a whole response, mean over the last SMOOTHED steps up to that one; 0 at the start."""
    near = row["kl_sequence"][max(0, step - SMOOTHED) : step]
    return max(0.0, sum(near) / len(near)) if near else 0.0


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _both(canvas: Any, picture: Path) -> str:
    """The drawing for the page, and as a picture of its own."""
    canvas.savefig(picture, dpi=80)
    return svg_of(canvas)
