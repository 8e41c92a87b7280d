"""Reward models of the laboratory's own: trained for so many steps from the shipped policy, on the part of the labelled
snippets that the shipped one learned from. And how one does on texts of policies that it has not seen."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from ppomax.assets import shipped
from ppomax.config import OptimConfig, RunConfig
from ppomax.config.stages import RewardModelConfig
from ppomax.data import Text, load_pairs
from ppomax.default import texts as reviews
from ppomax.models import load_policy, load_reward_model, load_tokenizer
from ppomax.rollout import Sampling, decode
from ppomax.saving.jsonl import read_rows
from ppomax.stages.reward_model import evaluate_pairs, score_texts, train_reward_model
from torch import Tensor

from bench.lab.grid import GridError

PREFIX = "lab:"
"""`model.reward_model: lab:200` of an arm is the reward model of 200 steps."""
DRAWS = 4
"""Responses to each held-out prompt, of each policy; every two of them are a pair."""
POLICIES = {"cool": ("start", 0.7), "start": ("start", 1.0), "hot": ("start", 1.3), "end": ("end", 1.0)}
"""Whose texts: the start policy at three temperatures, and the policy that the reward model has trained."""


def trained(wanted: str, seed: int, data: Path | None, folder: Path) -> Path:
    """The folder of the reward model `wanted`, made in `folder` unless it is there."""
    if data is None:
        raise GridError(f"{wanted} is trained on the labelled reviews, which are not beside this checkout")
    model = folder / "reward_model"
    if model.is_dir():
        return model
    parts = reviews.read_parts(data, 0)
    folder.mkdir(parents=True, exist_ok=True)
    reviews.write_rows(folder / "pairs.jsonl", reviews.pair_rows(parts["train"], seed))
    train_reward_model(
        RewardModelConfig(
            model="default",
            data=str(folder / "pairs.jsonl"),
            layers=4,
            max_tokens=1024,
            lm_coef=0.2,
            batch_tokens=1024,
            optim=OptimConfig(lr=5e-4, schedule="cosine", weight_decay=0.1, warmup=0.04, min_ratio=0.05),
            run=RunConfig(int(wanted.removeprefix(PREFIX)), seed, str(folder), threads=1, checkpoint_every=0),
        )
    )
    return model


def measured(
    path: Path, end: Path, prompts: Path, data: Path, folder: Path
) -> tuple[dict[str, list[float]], list[Any]]:
    """Accuracy and calibration error of the reward model `path` on held-out pairs of people's texts; and texts of
    several policies with its scores, for a judge to say which is better."""
    tokenizer, model = load_tokenizer(shipped("policy")), load_reward_model(path).eval()
    held_out = reviews.read_parts(data, 0)["held_out"]
    reviews.write_rows(folder / "human_pairs.jsonl", reviews.eval_pair_sets(held_out, 0)["snippets"])
    human = evaluate_pairs(model, load_pairs(str(folder / "human_pairs.jsonl"), tokenizer, 1024, bad_rows="drop")[0])
    heads = [(row["prompt"], tokenizer(row["prompt"])["input_ids"]) for row in read_rows(prompts)]
    texts: list[dict[str, Any]] = []
    for name, (whose, temperature) in POLICIES.items():
        policy = load_policy(shipped("policy") if whose == "start" else end).eval()
        ids = [x for _, x in heads for _ in range(DRAWS)]
        uids = range(20_000_000, 20_000_000 + len(ids))
        sampling = Sampling(48, temperature=temperature, seed=5)
        found = decode(policy, ids, uids, sampling, eos_ids=[tokenizer.eos_token_id]).tokens
        scores = score_texts(model, [Text(p + r, len(p)) for p, r in zip(ids, found, strict=True)])
        for i, (response, score) in enumerate(zip(found, scores.tolist(), strict=True)):
            prompt = heads[i // DRAWS][0]
            words = str(tokenizer.decode(response, skip_special_tokens=True))
            texts.append({"policy": name, "prompt": prompt, "response": words, "score": round(score, 4)})
    return {"rm_human": [round(human["accuracy"], 4)], "rm_human_ece": [round(human["ece"], 4)]}, texts


def agreement(texts: list[dict[str, Any]], gold: Tensor) -> dict[str, list[float]]:
    """Of each policy's pairs, how often the reward model takes the side that the judge does, `gold` being its score of
    each text; and how far its confidence is from that (expected calibration error over ten bins)."""
    out: dict[str, list[float]] = {}
    for name in POLICIES:
        at = [i for i, row in enumerate(texts) if row["policy"] == name]
        groups = [at[i : i + DRAWS] for i in range(0, len(at), DRAWS)]
        pairs = torch.tensor([pair for group in groups for pair in combinations(group, 2)])
        scores = torch.tensor([row["score"] for row in texts])
        gap, truth = (x[pairs[:, 0]] - x[pairs[:, 1]] for x in (scores, gold))
        pairs_right = ((gap * truth) > 0).double() + 0.5 * ((gap * truth) == 0).double()
        confidence = gap.abs().sigmoid().double()
        bins = ((confidence - 0.5) * 20).long().clamp(0, 9)
        off = [(bins == b).double().mean() * (confidence - pairs_right)[bins == b].mean().abs() for b in bins.unique()]
        out[f"rm_{name}"] = [round(float(pairs_right.mean()), 4)]
        out[f"rm_{name}_ece"] = [round(float(torch.stack(off).sum()), 4)]
    return out
