"""The runs of the grid: each once, by whichever process gets to it first; one row of an append-only file for each.

A run that was killed leaves no row and is done anew. Rows hold the series that figures and verdicts need; the samples,
which the judge reads, stay in the run's folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppomax.assets import shipped
from ppomax.config import ConfigError
from ppomax.data import load_texts
from ppomax.default import texts as reviews
from ppomax.models import load_policy, load_tokenizer
from ppomax.recipe.measures import distinct_n
from ppomax.saving.jsonl import append_row, read_rows
from ppomax.saving.lock import claimed
from ppomax.stages.ppo import train_ppo
from ppomax.stages.sft import mean_nll

from bench import machine
from bench.lab.grid import Grid, GridError
from bench.lab.reward_models import PREFIX, measured, trained

RESULTS = Path(__file__).parents[1] / "results" / "lab"
TRAIN = {
    "score": "objective/scores",
    "kl": "objective/kl_per_token",
    "kl_sequence": "objective/kl",
    "entropy": "policy/entropy_avg",
    "perplexity": "rollout/ref_perplexity",
    "train_length": "rollout/length",
    "policy_norm": "policy/grad_norm",
    "value_loss": "loss/value_avg",
    "explained": "val/explained_var",
}
"""Series of a row, a value a step, by the metric that each is."""
TEXTS = 200
"""Human snippets whose NLL is the tax."""


def rows(folder: Path = RESULTS) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows done, by arm and seed. GridError: one is there twice."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in read_rows(folder / "runs.jsonl"):
        key = (row["arm"], row["seed"])
        if key in found:
            raise GridError(f"{folder / 'runs.jsonl'} has {key[0]} with seed {key[1]} twice; take one of the rows out")
        found[key] = row
    return found


def checked(grid: Grid, done: dict[tuple[str, int], dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """`done` without arms that the grid has not; GridError names a row that other knobs made."""
    for (arm, seed), row in done.items():
        if arm in grid.arms and row["settings"] != grid.settings(arm):
            raise GridError(
                f"the row of {arm} with seed {seed} was made with other knobs than the grid's now; give the arm "
                "another name, or take its rows out"
            )
    return {key: row for key, row in done.items() if key[0] in grid.arms}


def run_all(grid: Grid, numbers: list[str], seeds: list[int], work: Path, folder: Path = RESULTS) -> Iterator[str]:
    """Every run of those figures that has no row yet and that no other process is at; a line for each."""
    arms = list(dict.fromkeys(arm for figure in grid.chosen(numbers) for arm in figure.arms))
    checked(grid, rows(folder))
    for arm in arms:
        for seed in seeds:
            if (arm, seed) in rows(folder):
                continue
            try:
                with claimed(work / arm / str(seed)):
                    if (arm, seed) not in rows(folder):
                        row = run_one(grid, arm, seed, work / arm / str(seed))
                        folder.mkdir(parents=True, exist_ok=True)
                        append_row(folder / "runs.jsonl", row)
                        first, last = row["proxy"][0], row["proxy"][-1]
                        yield f"{arm} seed {seed}: {row['seconds']:.0f} s, proxy {first:+.2f} -> {last:+.2f}"
            except ConfigError as error:
                if "is being written" not in str(error):
                    raise
                yield f"{arm} seed {seed}: another process is at it"


def run_one(grid: Grid, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one run in `folder`; its row. Leaves its samples there."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    train, held_out = prompt_files(folder)
    own = {"run.out": str(out), "data.prompts": str(train), "data.eval_prompts": str(held_out)}
    wanted, made = str(grid.config(arm, seed, **own).model.reward_model), None
    if wanted.startswith(PREFIX):
        made = trained(wanted, seed, data_folder(), folder.parents[1] / "reward-models" / f"{wanted[4:]}-{seed}")
        own["model.reward_model"] = str(made)
    config = grid.config(arm, seed, **own)
    began = time.perf_counter()
    train_ppo(config)
    seconds = time.perf_counter() - began
    steps = [r for r in read_rows(out / "metrics.jsonl") if r["step"] >= 1]
    alarms = read_rows(out / "alarms.jsonl")
    row = {
        "arm": arm,
        "seed": seed,
        "settings": grid.settings(arm),
        "commit": machine.commit(),
        "machine": machine.processor(),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "steps": config.run.steps,
        "alarm": alarms[0]["step"] if alarms else None,
        "pretrained": sum(r["step"] == 0 for r in read_rows(out / "metrics.jsonl")),
        **{name: [float(f"{r[key]:.4g}") for r in steps] for name, key in TRAIN.items()},
        **evaluated(read_rows(out / "samples.jsonl")),
        "tax": human_nll([shipped("policy"), out / "policy"], out),
    }
    data = data_folder()
    if made is not None and data is not None:
        figures, texts = measured(made, out / "policy", held_out, data, out)
        row |= figures
        reviews.write_rows(folder / "texts.jsonl", texts)
    shutil.copy(out / "samples.jsonl", folder / "samples.jsonl")
    shutil.rmtree(out)
    return row


def evaluated(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Means over the responses to the held-out prompts, at each step that has them."""
    out: dict[str, list[float]] = {n: [] for n in ("eval_steps", "proxy", "length", "finished", "distinct")}
    for step in sorted({r["step"] for r in samples}):
        here = [r for r in samples if r["step"] == step]
        out["eval_steps"].append(step)
        for name, key in (("proxy", "score"), ("length", "length"), ("finished", "finished")):
            out[name].append(round(sum(float(r[key]) for r in here) / len(here), 4))
        out["distinct"].append(round(distinct_n([r["response_ids"] for r in here]), 4))
    return out


def prompt_files(folder: Path) -> tuple[Path, Path]:
    """The shipped openings dealt out: every sixth is held out for the judges, the rest are trained on."""
    prompts = reviews.prompt_rows()
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    reviews.write_rows(train, [r for i, r in enumerate(prompts) if i % 6])
    reviews.write_rows(held_out, prompts[::6])
    return train, held_out


def data_folder() -> Path | None:
    """The labelled reviews beside a checkout, if they are there."""
    found = Path(__file__).resolve().parents[3] / "shared" / "data" / "reviews"
    return found if (found / "snippets.jsonl.gz").is_file() else None


def human_nll(policies: list[Path], folder: Path) -> list[float]:
    """Mean NLL of held-out human snippets under each policy, nats a token: what training costs the language model. []
    where the labelled reviews are not at hand."""
    data = data_folder()
    if data is None:
        return []
    path = folder / "human.jsonl"
    reviews.write_rows(path, reviews.sft_rows(reviews.read_parts(data, 0)["held_out"], 0)[:TEXTS])
    texts, _ = load_texts(str(path), load_tokenizer(policies[0]), 256)
    return [round(mean_nll(load_policy(p).eval(), texts, 4096), 4) for p in policies]
