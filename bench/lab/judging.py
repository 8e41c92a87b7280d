"""The judge's word on runs that are done: one row each of an append-only file, joined to the runs' own rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ppomax.default import texts as reviews
from ppomax.saving.jsonl import append_row, read_rows

from bench.lab.gold import Gold
from bench.lab.grid import GridError
from bench.lab.reward_models import agreement
from bench.lab.runs import RESULTS
from bench.lab.verdicts import Runs

SERIES = ("gold", "sentiment", "likeness")


def judge_all(judge: Gold, runs: Runs, work: Path, folder: Path = RESULTS) -> Iterator[str]:
    """Judge every run that has no row of this judge; a line for each."""
    done = {(r["arm"], r["seed"]) for r in read_rows(folder / "gold.jsonl") if r["judge"] == judge.name}
    for arm, seed in runs:
        if (arm, seed) in done:
            continue
        path = work / arm / str(seed) / "samples.jsonl"
        if not path.is_file():
            yield f"{arm} seed {seed}: its samples are not in {path.parent}; only the machine that ran it can judge it"
            continue
        row = judged(judge, read_rows(path), str(path))
        texts = read_rows(path.parent / "texts.jsonl")
        if texts:
            row |= agreement(texts, judge([(t["prompt"] + t["response"]).strip() for t in texts]).gold)
        append_row(folder / "gold.jsonl", {"arm": arm, "seed": seed, "judge": judge.name, **row})
        yield f"{arm} seed {seed}: gold {row['gold'][0]:+.2f} -> {row['gold'][-1]:+.2f}, win rate {row['win'][-1]:.2f}"


def judged(judge: Gold, samples: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Means at each step, and the win rate over the start, prompt by prompt. GridError: responses to prompts that the
    judge was not made for."""
    known = {row["prompt"].strip() for row in reviews.prompt_rows()}
    odd = sorted({r["prompt"].strip() for r in samples} - {p.replace(" ,", ",") for p in known})
    if odd:
        raise GridError(f"{name}: the judge is made for continuations of the shipped openings, not of {odd[0]!r}")
    steps = sorted({r["step"] for r in samples})
    texts = {s: [(r["prompt"] + r["response"]).strip() for r in samples if r["step"] == s] for s in steps}
    found = {s: judge(texts[s]) for s in steps}
    start = found[steps[0]].gold
    proxy = torch.tensor([float(r["score"]) for r in samples if r["step"] == steps[0]])
    out: dict[str, Any] = {n: [round(float(getattr(found[s], n).mean()), 4) for s in steps] for n in SERIES}
    wins = [((found[s].gold > start).float() + 0.5 * (found[s].gold == start).float()).mean() for s in steps]
    out["win"] = [round(float(w), 4) for w in wins]
    return out | {"gold_std": round(float(start.std()), 4), "proxy_std": round(float(proxy.std()), 4)}


def with_gold(runs: Runs, folder: Path = RESULTS) -> Runs:
    """The runs' rows with what the newest judge said of them."""
    rows = read_rows(folder / "gold.jsonl")
    newest = rows[-1]["judge"] if rows else None
    said = {(r["arm"], r["seed"]): r for r in rows if r["judge"] == newest}
    return {key: {**said.get(key, {}), **row} for key, row in runs.items()}
