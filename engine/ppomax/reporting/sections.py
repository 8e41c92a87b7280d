"""The sections of a report, each a function of the runs that gives HTML. What a run wrote is escaped."""

from __future__ import annotations

import base64
import html
import math
import statistics
from collections.abc import Sequence
from typing import Any

import yaml

from ppomax.config import MonitorConfig, build
from ppomax.config.mapping import flat
from ppomax.reporting import plots
from ppomax.reporting.alarm import means, thresholds
from ppomax.reporting.runs import Run
from ppomax.reporting.seeds import groups, mean_curve

GLANCE = {
    "objective/scores": "score (raw, mean)",
    "objective/kl_per_token": "KL per token (k3, nats)",
    "rollout/ref_perplexity": "response perplexity under the start model",
    "rollout/distinct_2": "distinct bigrams",
    "rollout/length": "response length (tokens)",
    "rollout/truncated": "truncated share",
    "policy/entropy_avg": "entropy (nats a token)",
    "val/explained_var": "critic's explained variance",
}
STABILITY = {
    "objective/scores": "Score",
    "eval/win_rate": "Win rate over the start, held-out prompts",
    "objective/kl_per_token": "KL to the start model, nats a token",
    "rollout/ref_perplexity": "Response perplexity, start model",
    "rollout/length": "Response length, tokens",
    "policy/entropy_avg": "Entropy, nats a token",
    "rollout/distinct_2": "Distinct bigrams, share",
    "rollout/truncated": "Truncated responses, share",
    "val/explained_var": "Critic: explained variance",
    "objective/scores_p99": "Score, p99",
}
LEARNING = {
    "loss/policy_avg": "Policy loss",
    "loss/value_avg": "Value loss",
    "loss/ptx_avg": "ptx loss (weighted)",
    "policy/approxkl_avg": "KL to the policy that sampled (k3)",
    "policy/clipfrac_avg": "Clipped ratios, share",
    "val/clipfrac_avg": "Clipped values, share",
    "policy/grad_norm": "Gradient norm, policy",
    "critic/grad_norm": "Gradient norm, critic",
    "val/ratio_max": "Largest ratio",
    "objective/kl_coef": "KL coefficient",
    "lr": "Learning rate, policy",
    "perf/tokens_per_second": "Response tokens a second in the rollout",
}


FLOORS = {"val/explained_var": -1.0}
"""Below this a panel shows nothing: an untrained critic would squeeze the rest."""


def header(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        model = run.config.get("model") or {}
        policy = (model.get("policy") if isinstance(model, dict) else model) or "the model that ships with ppomax"
        known = [f"preset {run.config['preset']}"] if "preset" in run.config else []
        seed = (run.config.get("run") or {}).get("seed")
        known += [str(policy), f"{run.rows[-1]['step']} steps"] + ([f"seed {seed}"] if seed is not None else [])
        lines.append(f"<p>{tag(run)} <span class=faint>{esc(' · '.join(known))}</span>{made_by(run)}</p>")
    return f"<header><h1>{'Comparison of runs' if len(runs) > 1 else 'Training run'}</h1>{''.join(lines)}</header>"


def made_by(run: Run) -> str:
    """Date, data, machine, versions and command, as far as the run's folder tells them."""
    model, data, reward = (run.config.get(part) or {} for part in ("model", "data", "reward"))
    known = {
        "begun": run.about.get("date"),
        "prompts": data.get("prompts") if isinstance(data, dict) else data,
        "reward": reward.get("function") or (model.get("reward_model") if isinstance(model, dict) else None),
        "machine": run.about.get("machine"),
        "versions": ", ".join(f"{k} {v}" for k, v in run.about.get("versions", {}).items()) or None,
        "command": run.about.get("command"),
    }
    words = [f"{name}: {esc(str(value))}" for name, value in known.items() if value]
    return f"<br><small class=faint>{' · '.join(words)}</small>" if words else ""


def glance(runs: Sequence[Run]) -> str:
    """Start and end of the metrics that matter, a column a run."""
    heads = "".join(f"<th>{tag(run)}" for run in runs)
    rows = ""
    for metric, label in GLANCE.items():
        cells = "".join(f"<td>{arrow(run.start.get(metric), run.end.get(metric))}" for run in runs)
        rows += f"<tr><td>{esc(label)}{cells}"
        if metric == "objective/scores":
            rows += "<tr><td>gain in standard deviations of the start's scores" + "".join(
                f"<td><b>{gain(run)}</b>" for run in runs
            )
    last = max(run.end_steps for run in runs)
    note = f"Start: the first buffer, of the start policy. End: mean of the last {last} steps."
    return section("Start → end", f"<table><tr><th>{heads}{rows}</table><p class=faint>{note}</p>")


def change(run: Run, metric: str) -> str:
    """Start and end of a metric as text."""
    return f"{number(run.start.get(metric))} -> {number(run.end.get(metric))}"


def gain(run: Run) -> str:
    spread = run.start.get("objective/scores_std")
    if not spread or "objective/scores" not in run.end:
        return "–"
    return f"{(run.end['objective/scores'] - run.start['objective/scores']) / spread:+.2f}"


def outcome_section(runs: Sequence[Run]) -> str:
    """What went wrong, in which metric first."""
    parts = []
    for run in runs:
        parts.append(f"<h3>{tag(run)} {outcome(run)}</h3>")
        items = "".join(
            f"<tr><td class=num>{step}<td>{esc(sign.kind)}{'' if sign.counted else ' *'}<td>{esc(sign.text)}"
            f"<td class=faint>{esc(sign.metric)}"
            for step, sign in run.history.first
        )
        if items:
            parts.append(f"<table><tr><th class=num>step<th>sign<th>what was seen<th>metric{items}</table>")
    starred = any(not sign.counted for run in runs for _, sign in run.history.first)
    note = "Moving means against the first steps; each line is the first step at which the sign held."
    note += " Two kinds of sign, or a large KL, raise the alarm; * does not count for it." if starred else ""
    return section("What went wrong, and where first", "".join(parts) + f"<p class=faint>{note}</p>")


def outcome(run: Run) -> str:
    """Whether the alarm was raised, in words; a run that ended within its baseline was not judged."""
    if run.history.alarms:
        return f"<span class=bad>collapse alarm at step {', '.join(map(str, run.history.alarms))}</span>"
    if len(run.rows) <= run.baseline_steps:
        return f"<span class=faint>too short to judge: the start is its first {run.baseline_steps} steps</span>"
    seen = "" if run.history.first else " <span class=faint>no metric left its healthy range</span>"
    return f"<span class=good>no collapse alarm</span>{seen}"


BANDS = {
    "objective/scores": ("objective/scores_p5", "objective/scores_p95", "p5 to p95"),
    "eval/win_rate": ("eval/win_rate_low", "eval/win_rate_high", "95 %"),
}
"""Edges of the band around a metric of a single run, and what they are."""


def panels(runs: Sequence[Run], metrics: dict[str, str]) -> str:
    """A grid of curves, seeds of one configuration as their mean; a metric that no run has is left out."""
    out, together = [], groups(runs)
    for metric, title in metrics.items():
        each = [[c for run in group if (c := curve(run, metric, band=len(runs) == 1)).values] for group in together]
        drawn = [mean_curve(curves) if len(curves) > 1 else curves[0] for curves in each if curves]
        if not any(value for c in drawn for value in c.values):
            continue  # not there, or switched off in all runs
        first = runs[0]
        level = first.start.get(metric) if metric in STABILITY else None
        limits = thresholds(metric, first.start, build(MonitorConfig, first.config.get("monitor") or {}))
        band = BANDS[metric][2] if metric in BANDS else ""
        band = f" (band: {band})" if len(runs) == 1 and drawn[0].low else ""
        out.append(figure(title + band, plots.curve_panel(drawn, limits=limits, start=level, floor=FLOORS.get(metric))))
    return f"{legend(runs)}<div class=grid>{''.join(out)}</div>"


def pretraining(runs: Sequence[Run]) -> str:
    """What the critic's pre-training did, buffer by buffer."""
    out = []
    for metric, title in (("explained_var", "Explained variance"), ("value_loss", "Value loss")):
        curves = []
        for run in runs:
            rows = [r for r in run.pretraining if f"pretrain/{metric}" in r]
            buffers, values = [r.get("pretrain/buffers", 0) for r in rows], [r[f"pretrain/{metric}"] for r in rows]
            curves += [plots.Curve(buffers, values, run.colour)] if rows else []
        if curves:
            out.append(figure(title, plots.curve_panel(curves, x="buffer")))
    return section("Critic pre-training", f"<div class=grid>{''.join(out)}</div>") if out else ""


def curve(run: Run, metric: str, *, band: bool) -> plots.Curve:
    rows = [r for r in run.rows if isinstance(r.get(metric), (int, float)) and math.isfinite(r[metric])]
    low, high, _ = BANDS.get(metric, ("", "", ""))
    edges = band and bool(low) and all(low in r and high in r for r in rows)
    return plots.Curve(
        [r["step"] for r in rows],
        [r[metric] for r in rows],
        run.colour,
        [r[low] for r in rows] if edges else (),
        [r[high] for r in rows] if edges else (),
        run.history.alarms,
    )


def held_out(runs: Sequence[Run]) -> str:
    """Scores and calibration of reward models on the pairs that they were not trained on."""
    out = []
    for run in runs:
        if run.picture:
            out.append(figure(run.name, "data:image/png;base64," + base64.b64encode(run.picture).decode("ascii")))
    return section("Held-out pairs", f"<div class=held>{''.join(out)}</div>") if out else ""


def score_histograms(runs: Sequence[Run]) -> str:
    """Score distribution of the first and the last buffer that was kept, on one axis for all runs."""
    kept = [run for run in runs if run.scores]
    if not kept:
        return section("Scores of one buffer", "<p class=faint>The runs kept no scores.</p>")
    everything = [x for run in kept for row in (run.scores[0], run.scores[-1]) for x in row["scores"]]
    out = []
    for run in kept:
        first, last = run.scores[0], run.scores[-1]
        groups = [(f"step {first['step']}", first["scores"], plots.FAINT)]
        groups += [(f"step {last['step']}", last["scores"], run.colour)] if last is not first else []
        out.append(figure(run.name, plots.histogram(groups, (min(everything), max(everything)))))
    return section("Scores of one buffer", f"<div class='grid wide'>{''.join(out)}</div>")


def phase_times(runs: Sequence[Run]) -> str:
    times = [(run.name, means(run.rows)) for run in runs]
    rows = ""
    for run, (_, mean) in zip(runs, times, strict=True):
        total = sum(row.get("time/step", 0.0) for row in run.rows)
        before = sum(row.get("time/step", 0.0) for row in run.pretraining)
        slowest = max((row.get("time/step", 0.0) for row in run.rows), default=0.0)
        median = statistics.median([row.get("time/step", 0.0) for row in run.rows])
        rows += (
            f"<tr><td>{tag(run)}<td class=num>{before:.1f}<td class=num>{total:.1f}<td class=num>{median:.2f}"
            f"<td class=num>{slowest:.2f}<td class=num>{mean.get('perf/tokens_per_second', math.nan):.0f}"
        )
    heads = "<th class=num>".join(
        [
            "<tr><th>",
            "critic pre-training, s",
            "PPO steps, s",
            "median step, s",
            "slowest step, s",
            "tokens/s in the rollout",
        ]
    )
    return section(
        "Phase times", f"<img class=bars alt='phase times' src='{plots.phase_bars(times)}'><table>{heads}{rows}</table>"
    )


def sample_table(runs: Sequence[Run]) -> str:
    """Responses to the fixed prompts: the start's, and each run's last."""
    if not runs[0].samples:
        return section("Samples", "<p class=faint>The run kept no samples (monitor.samples_every: 0).</p>")
    first = by_prompt(runs[0].samples, last=False)
    ends = [by_prompt(run.samples, last=True) for run in runs]
    heads = "".join(f"<th>{tag(run)} after step {max((r['step'] for r in run.samples), default=0)}" for run in runs)
    rows = ""
    for prompt, start in first.items():
        cells = "".join(f"<td>{response(end.get(prompt))}" for end in ends)
        rows += f"<tr><td class=prompt>{esc(prompt)}<td>{response(start)}{cells}"
    return section(
        "Samples",
        f"<table class=texts><tr><th>prompt<th>start, step {runs[0].samples[0]['step']}{heads}{rows}</table>"
        + "".join(sample_history(run) for run in runs),
    )


def by_prompt(samples: Sequence[dict[str, Any]], *, last: bool) -> dict[str, dict[str, Any]]:
    """Prompt -> its response at the first or last step with samples. Prompts that are there twice are numbered."""
    if not samples:
        return {}
    step = samples[-1 if last else 0]["step"]
    out: dict[str, dict[str, Any]] = {}
    for row in (r for r in samples if r["step"] == step):
        prompt, copy = row["prompt"], 2
        while prompt in out:
            prompt, copy = f"{row['prompt']} ({copy})", copy + 1
        out[prompt] = row
    return out


def sample_history(run: Run) -> str:
    rows = "".join(
        f"<tr><td class=num>{row['step']}<td class=prompt>{esc(row['prompt'])}<td>{response(row)}"
        for row in run.samples
    )
    return f"<details><summary>all samples of {esc(run.name)}</summary><table class=texts>{rows}</table></details>"


def response(row: dict[str, Any] | None) -> str:
    if row is None:
        return "<span class=faint>–</span>"
    cut = "" if row.get("finished", True) else " <span class=faint>[cut]</span>"
    text = esc(row["response"]) if row["response"].strip() else "<span class=faint>(empty)</span>"
    return f"{text}{cut} <span class=score>{row['score']:.2f}</span>"


def differences(runs: Sequence[Run]) -> str:
    """Knobs in which the runs differ."""
    every = [flat(run.config) for run in runs]
    keys = [k for k in dict.fromkeys(k for one in every for k in one) if len({str(one.get(k)) for one in every}) > 1]
    rows = "".join(
        f"<tr><td><code>{esc(k)}</code>" + "".join(f"<td>{esc(str(one.get(k)))}" for one in every) for k in keys
    )
    table = f"<table><tr><th>knob{''.join(f'<th>{tag(run)}' for run in runs)}{rows}</table>"
    return section("Differences", table) if len(runs) > 1 else ""


def configuration(runs: Sequence[Run]) -> str:
    """Each run's resolved configuration."""
    body = ""
    for run in runs:
        text = yaml.safe_dump(run.config, sort_keys=False)
        body += f"<details><summary>resolved configuration of {esc(run.name)}</summary><pre>{esc(text)}</pre></details>"
    return section("Configuration", body)


# ---- small pieces ---------------------------------------------------------------------------------------------------


def section(title: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{body}</section>"


def figure(title: str, source: str) -> str:
    return f"<figure><figcaption>{esc(title)}</figcaption><img alt='{esc(title)}' src='{source}'></figure>"


def legend(runs: Sequence[Run]) -> str:
    words = "faint line: raw values, and the start's level; dotted: thresholds of the alarm"
    words += "; dashed: collapse alarm" if any(run.history.alarms for run in runs) else ""
    if len(runs) == 1:
        return f"<p class=faint>{words}</p>"
    named = []
    for group in groups(runs):
        more = f" and {len(group) - 1} more seed{'s' * (len(group) > 2)}, {drawn_as(group)}" if len(group) > 1 else ""
        named.append(tag(group[0]) + more)
    return f"<p>{' &nbsp; '.join(named)}<br><span class=faint>{words}</span></p>"


def drawn_as(group: Sequence[Run]) -> str:
    """What mean_curve makes of so many seeds."""
    return "mean in its 95 % interval" if len(group) > 2 else "their mean and both"


def tag(run: Run) -> str:
    """The run's name with its colour."""
    return f"<span class=run><i style='background:{run.colour}'></i>{esc(run.name)}</span>"


def arrow(start: float | None, end: float | None) -> str:
    return f"{number(start)} <span class=faint>→</span> <b>{number(end)}</b>"


def number(x: float | None) -> str:
    return "–" if x is None else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def esc(text: str) -> str:
    return html.escape(text, quote=True)
