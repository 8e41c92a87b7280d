"""A reward model from preference pairs.

    d    = R(prompt, chosen) - R(prompt, rejected),  R read at the last response token
    loss = mean softplus(-(d - margin)) + lm_coef * mean over chosen response tokens of -log p(token)
The second term is the paper's imitation loss (beta_rm; Secrets of RLHF I, eq. 2, signs corrected): same trunk, the
language model's own head on top. Both terms come out of one packed forward. Afterwards scores may be centred: given
responses score mean 0 (std 1). Sources: softplus in place of log(sigmoid + eps), which would flatten for very wrong
pairs; centring as in N+ implementation details.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppomax.assets import named_model
from ppomax.config.mapping import to_dict
from ppomax.config.stages import RewardModelConfig
from ppomax.data import Pair, Text, load_pairs, load_texts
from ppomax.models import (
    Head,
    RewardModel,
    embedding_weight,
    head_of,
    load_policy,
    load_reward_model,
    load_tokenizer,
    make_reward_model,
    packed_hidden,
)
from ppomax.models.files import model_config
from ppomax.recipe.batch import pack
from ppomax.saving.lock import claimed
from ppomax.saving.model_folder import save_model
from ppomax.stages.sft import autocast, counted_tokens, token_nll
from ppomax.stages.supervised_loop import BatchOrder, chunks, run_loop

log = logging.getLogger(__name__)


class RewardTrainee(nn.Module):
    """What is trained: a reward model and, for the imitation loss, a language-model head on the same trunk."""

    def __init__(self, reward_model: RewardModel, head: Head | None):
        super().__init__()
        self.reward_model = reward_model
        tied = reward_model.model.config.tie_word_embeddings
        self.head = head
        # A tied head is the trunk's own embedding; a separate one is trained here and left behind.
        self.head_weight = None if head is None or tied else nn.Parameter(head.weight.detach().clone())

    def lm_head(self) -> Head:
        """The head with the weight that is being trained."""
        assert self.head is not None
        weight = self.head_weight if self.head_weight is not None else embedding_weight(self.reward_model.model)
        bias = None if self.head.bias is None else self.head.bias.detach()
        return dataclasses.replace(self.head, weight=weight, bias=bias)

    @classmethod
    def load(cls, config: RewardModelConfig) -> RewardTrainee:
        """From a causal LM (trunk, new head) or from an earlier reward model."""
        start = named_model(config.model)
        architectures = model_config(start).architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            policy = load_policy(start, attn_implementation=config.attention)
            reward_model = make_reward_model(policy, layers=config.layers, seed=config.run.seed)
            return cls(reward_model, head_of(policy) if config.lm_coef else None)
        reward_model = load_reward_model(start, attn_implementation=config.attention)
        if config.lm_coef and not reward_model.model.config.tie_word_embeddings:
            raise ValueError(
                f"reward-model: {config.model} has no language-model head, which lm_coef = {config.lm_coef} needs; "
                "start from a causal language model or set lm_coef=0"
            )
        return cls(reward_model, Head(embedding_weight(reward_model.model)) if config.lm_coef else None)


def score_pairs(model: RewardModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and the rejected sides, (P,) fp32 each."""
    tokens, cu_seqlens = pack(
        [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs], model.model.device
    )
    chosen, rejected = model.scores(tokens, cu_seqlens).chunk(2)
    return chosen, rejected


def pair_loss(
    trainee: RewardTrainee, pairs: Sequence[Pair], *, margin: float, lm_coef: float, impl: str = "auto"
) -> tuple[Tensor, dict[str, Any]]:
    """The loss of the head note on one batch, and its parts."""
    model = trainee.reward_model
    device = model.model.device
    tokens, cu_seqlens = pack([p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs], device)
    hidden = packed_hidden(model.model, tokens, cu_seqlens)
    chosen, rejected = model.values_of(hidden.index_select(0, cu_seqlens[1:].long() - 1)).chunk(2)
    gap = chosen - rejected - torch.tensor([p.margin + margin for p in pairs], device=device)
    rank_loss = softplus(-gap).mean()
    metrics: dict[str, Any] = {
        "rank_loss": rank_loss.detach(),
        "accuracy": (chosen > rejected).float().mean(),
        "score_gap": (chosen - rejected).detach().mean(),
    }
    if not lm_coef:
        return rank_loss, metrics
    counted = counted_tokens([Text(p.prompt + p.chosen, max(1, len(p.prompt))) for p in pairs], device)
    lm_loss = token_nll(trainee.lm_head(), hidden, tokens, counted, impl=impl)
    return rank_loss + lm_coef * lm_loss, metrics | {"lm_loss": lm_loss.detach()}


# ---- held-out figures -----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_pairs(model: RewardModel, pairs: Sequence[Pair], batch_tokens: int = 16384) -> dict[str, Any]:
    """Figures and plot data on pairs that the model was not trained on.

    accuracy: share of pairs whose chosen side scores higher (equal scores count half); rank_loss; score_gap (mean of
    d); calibration: ten bins of confidence max(p, 1 - p), p = sigmoid(d), each with its mean confidence, share right
    and count, and their weighted mean distance `ece`; histogram of both sides' scores.
    """
    sides = torch.empty(2, len(pairs))
    lengths = [2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]
    for rows in chunks(lengths, batch_tokens):
        chosen, rejected = score_pairs(model, [pairs[row] for row in rows])
        sides[:, rows] = torch.stack([chosen, rejected]).float().cpu()
    gap = sides[0] - sides[1]
    right = (gap > 0).double() + 0.5 * (gap == 0).double()
    confidence = torch.sigmoid(gap.abs()).double()
    bins = ((confidence - 0.5) * 20).long().clamp(0, 9)
    calibration = [
        {
            "confidence": confidence[bins == b].mean().item(),
            "accuracy": right[bins == b].mean().item(),
            "pairs": int((bins == b).sum()),
        }
        for b in range(10)
        if bool((bins == b).any())
    ]
    edges = torch.linspace(sides.min().item(), sides.max().item() + 1e-6, 41)
    return {
        "pairs": len(pairs),
        "accuracy": right.mean().item(),
        "rank_loss": softplus(-gap).mean().item(),
        "score_gap": gap.mean().item(),
        "ece": sum(c["pairs"] * abs(c["confidence"] - c["accuracy"]) for c in calibration) / len(pairs),
        "calibration": calibration,
        "histogram": {
            "edges": edges.tolist(),
            "chosen": torch.histogram(sides[0], edges).hist.tolist(),
            "rejected": torch.histogram(sides[1], edges).hist.tolist(),
        },
    }


def plot_held_out(figures: dict[str, Any], path: Path) -> None:
    """Score histograms and calibration curve of evaluate_pairs as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for side in ("chosen", "rejected"):
        left.stairs(figures["histogram"][side], figures["histogram"]["edges"], fill=True, alpha=0.5, label=side)
    left.set(xlabel="score", ylabel="responses", title=f"held-out scores, pair accuracy {figures['accuracy']:.3f}")
    left.legend()
    right.plot([0.5, 1], [0.5, 1], "--", color="grey")
    right.plot([c["confidence"] for c in figures["calibration"]], [c["accuracy"] for c in figures["calibration"]], "o-")
    right.set(xlabel="confidence", ylabel="share right", title=f"calibration, ECE {figures['ece']:.3f}")
    figure.savefig(path, dpi=100)


# ---- centring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_texts(model: RewardModel, texts: Sequence[Text], batch_tokens: int = 16384) -> Tensor:
    """Scores (len(texts),) fp32 on the CPU, in the order given."""
    scores = torch.empty(len(texts))
    for rows in chunks([len(text.tokens) for text in texts], batch_tokens):
        tokens, cu_seqlens = pack([texts[row].tokens for row in rows], model.model.device)
        scores[rows] = model.scores(tokens, cu_seqlens).cpu()
    return scores


@torch.no_grad()
def centre_scores(
    model: RewardModel, texts: Sequence[Text], *, unit_std: bool = False, batch_tokens: int = 16384
) -> None:
    """Make these texts score mean 0, and with unit_std standard deviation 1, in place: the scale goes into the score
    head, the shift into config.score_offset, which Critic and RewardModel add (a HF score head has no bias)."""
    if unit_std:
        std = score_texts(model, texts, batch_tokens).double().std().item()
        if not std > 0:
            raise ValueError(
                f"centre_scores: {len(texts)} responses have score std {std}; give at least two different ones"
            )
        model.score.weight.div_(std)
        model.model.config.score_offset = model.offset / std
    model.model.config.score_offset = model.offset - score_texts(model, texts, batch_tokens).double().mean().item()


# ---- the stage ------------------------------------------------------------------------------------------------------


def train_reward_model(config: RewardModelConfig) -> Path:
    """Train, evaluate, centre and write metrics.jsonl, held_out.json / .png and the model; returns its folder,
    `run.out`/reward_model."""
    out = Path(config.run.out or "runs/reward-model")
    with claimed(out, config):
        return _train(config, out)


def _train(config: RewardModelConfig, out: Path) -> Path:
    start = named_model(config.model)
    identity = to_dict(config) | {"run": {"seed": config.run.seed}}
    tokenizer = load_tokenizer(config.tokenizer or start)
    pairs, _ = load_pairs(config.data, tokenizer, config.max_tokens, bad_rows=config.bad_rows)
    held_out = (
        load_pairs(config.eval_data, tokenizer, config.max_tokens, bad_rows=config.bad_rows)[0]
        if config.eval_data
        else []
    )
    trainee = RewardTrainee.load(config)
    model = trainee.reward_model
    trainee.train()
    order = BatchOrder(
        [2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs], config.batch_tokens, config.run.seed
    )
    log.info("%d pairs, %d held out, %d steps an epoch", len(pairs), len(held_out), len(order))

    def loss_of(step: int) -> tuple[Tensor, dict[str, Any]]:
        with autocast(config.autocast, model.model.device):
            batch = [pairs[row] for row in order.batch(step)]
            return pair_loss(trainee, batch, margin=config.margin, lm_coef=config.lm_coef, impl=config.impl)

    def evaluate() -> dict[str, float]:
        if not held_out:
            return {}
        figures = evaluate_pairs(model, held_out, config.batch_tokens)
        return {f"eval_{name}": figures[name] for name in ("accuracy", "rank_loss", "score_gap", "ece")}

    run_loop(trainee, loss_of, config.optim, config.run, out, identity, evaluate, eval_every=config.eval_every)
    if config.centre_data:
        texts, _ = load_texts(
            config.centre_data, tokenizer, config.max_tokens, overlong="drop", bad_rows=config.bad_rows
        )
        centre_scores(model, texts, unit_std=config.unit_std, batch_tokens=config.batch_tokens)
    if held_out:
        figures = evaluate_pairs(model, held_out, config.batch_tokens)
        (out / "held_out.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
        plot_held_out(figures, out / "held_out.png")
    return save_model(model, tokenizer, out / "reward_model")
