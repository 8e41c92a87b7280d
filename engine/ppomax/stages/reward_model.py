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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppomax.assets import named_model
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
    pick_device,
)
from ppomax.models.adapters import add_adapters
from ppomax.models.files import model_config
from ppomax.models.fingerprints import fingerprint_rows
from ppomax.models.partitioned import gathered
from ppomax.models.recompute import recompute_blocks
from ppomax.recipe.batch import pack
from ppomax.saving.export_policy import export_model
from ppomax.sharding import ranks
from ppomax.stages.sft import autocast, counted_in, counted_tokens, token_nll
from ppomax.stages.supervised_loop import Metrics, Task, claimed_run, own_chunks, placed, run_loop, sharded_read


class RewardTrainee(nn.Module):
    """What is trained: a reward model and, for the imitation loss, a language-model head on the same trunk."""

    def __init__(self, reward_model: RewardModel, head: Head | None):
        super().__init__()
        self.reward_model = reward_model
        tied = reward_model.model.config.tie_word_embeddings
        self.head = head
        # A tied head is the trunk's own embedding; a separate one is trained here and left behind.
        self.head_weight = None if head is None or tied else head.weight

    @property
    def head_of_trunk(self) -> Tensor:
        """The weight of the language-model head: this module's own, or the trunk's embedding where the two are tied."""
        return self.head_weight if self.head_weight is not None else embedding_weight(self.reward_model.model)

    @property
    def read_by_hand(self) -> list[Tensor]:
        """What the loss reads outside of its own module's forward, for ZeRO-3."""
        return [] if self.head is None else [self.head_of_trunk]

    def lm_head(self) -> Head:
        """The head with the weight that is being trained."""
        assert self.head is not None
        bias = None if self.head.bias is None else self.head.bias.detach()
        return dataclasses.replace(self.head, weight=self.head_of_trunk, bias=bias)

    @classmethod
    def load(cls, config: RewardModelConfig) -> RewardTrainee:
        """From a causal LM (trunk, new head) or from an earlier reward model."""
        start, dtype, zero = named_model(config.model), getattr(torch, config.dtype), sharded_read(config)
        architectures = model_config(start).architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            policy = load_policy(start, dtype, zero=zero).to(pick_device(config.run.device))  # type: ignore[arg-type]
            source = start if zero else policy
            reward_model = make_reward_model(source, dtype, layers=config.layers, seed=config.run.seed, zero=zero)
            placed(reward_model.model, config)
            return cls(reward_model, head_of(policy) if config.lm_coef else None)._set_up(config)
        reward_model = load_reward_model(start, dtype, zero=zero)
        placed(reward_model.model, config)
        if config.lm_coef and not reward_model.model.config.tie_word_embeddings:
            raise ValueError(
                f"reward-model: {config.model} has no language-model head, which lm_coef = {config.lm_coef} needs; "
                "start from a causal language model or set lm_coef=0"
            )
        return cls(reward_model, Head(embedding_weight(reward_model.model)) if config.lm_coef else None)._set_up(config)

    def _set_up(self, config: RewardModelConfig) -> RewardTrainee:
        """What is trained of it: all, or adapters and the score head."""
        if config.train == "lora":
            self.requires_grad_(False)
            add_adapters(self.reward_model.model, config, seed=config.run.seed)
            self.reward_model.score.requires_grad_(True)
        if config.gradient_checkpointing:
            recompute_blocks(self.reward_model)
        return self


def score_pairs(model: RewardModel, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and the rejected sides, (P,) fp32 each."""
    tokens, cu_seqlens = pack(
        [p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs], model.model.device
    )
    chosen, rejected = model.scores(tokens, cu_seqlens).chunk(2)
    return chosen, rejected


def tokens_of(pair: Pair) -> int:
    """Of both sides, the prompt twice."""
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def chosen_texts(pairs: Sequence[Pair]) -> list[Text]:
    """The chosen sides as texts whose responses count."""
    return [Text(p.prompt + p.chosen, max(1, len(p.prompt))) for p in pairs]


def pair_loss(
    trainee: RewardTrainee,
    pairs: Sequence[Pair],
    batch: Sequence[Pair] | None = None,
    *,
    margin: float,
    lm_coef: float,
    impl: str = "auto",
) -> tuple[Tensor, Metrics]:
    """The share of `pairs` in the loss of the head note over `batch` (None: they are all of it), and in its parts."""
    batch = pairs if batch is None else batch
    model = trainee.reward_model
    device = model.model.device
    tokens, cu_seqlens = pack([p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs], device)
    hidden = packed_hidden(model.model, tokens, cu_seqlens)
    chosen, rejected = model.values_of(hidden.index_select(0, cu_seqlens[1:].long() - 1)).chunk(2)
    gap = chosen - rejected - torch.tensor([p.margin + margin for p in pairs], device=device)
    rank_loss = softplus(-gap).sum() / len(batch)
    metrics = {
        "rank_loss": rank_loss.detach(),
        "accuracy": (chosen > rejected).float().sum() / len(batch),
        "score_gap": (chosen - rejected).detach().sum() / len(batch),
    }
    if not lm_coef:
        return rank_loss, metrics
    counted, count = counted_tokens(chosen_texts(pairs), device), counted_in(chosen_texts(batch))
    lm_loss = token_nll(trainee.lm_head(), hidden, tokens, counted, normalizer=count, impl=impl)
    return rank_loss + lm_coef * lm_loss, metrics | {"lm_loss": lm_loss.detach()}


# ---- held-out figures -----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_pairs(model: RewardModel, pairs: Sequence[Pair], batch_tokens: int = 16384) -> dict[str, Any]:
    """Figures and plot data on pairs that the model was not trained on. Of several ranks, which all call, each reads
    its share.

    accuracy: share of pairs whose chosen side scores higher (equal scores count half); rank_loss; score_gap (mean of
    d); calibration: ten bins of confidence max(p, 1 - p), p = sigmoid(d), each with its mean confidence, share right
    and count, and their weighted mean distance `ece`; histogram of both sides' scores.
    """
    sides = torch.zeros(2, len(pairs))
    for rows in own_chunks([tokens_of(pair) for pair in pairs], batch_tokens):
        chosen, rejected = score_pairs(model, [pairs[row] for row in rows])
        sides[:, rows] = torch.stack([chosen, rejected]).float().cpu()
    sides = ranks.sum_host(sides)
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
    """Scores (len(texts),) fp32 on the CPU, in the order given. Of several ranks, which all call, each reads its
    share."""
    scores = torch.zeros(len(texts))
    for rows in own_chunks([len(text.tokens) for text in texts], batch_tokens):
        tokens, cu_seqlens = pack([texts[row].tokens for row in rows], model.model.device)
        scores[rows] = model.scores(tokens, cu_seqlens).cpu()
    return ranks.sum_host(scores)


@torch.no_grad()
def centre_scores(model: RewardModel, scores: Callable[[], Tensor], *, unit_std: bool = False) -> None:
    """Make some texts score mean 0, and with unit_std standard deviation 1, in place: the scale goes into the score
    head, the shift into config.score_offset, which Critic and RewardModel add (a HF score head has no bias).

    scores() gives the scores of those texts as they are now; every rank calls."""
    if unit_std:
        found = scores().double()
        std = found.std().item()
        if not std > 0:
            raise ValueError(
                f"centre_scores: {len(found)} responses have score std {std}; give at least two different ones"
            )
        with gathered(model.score, modify=True):
            model.score.weight.div_(std)
        model.model.config.score_offset = model.offset / std
    model.model.config.score_offset = model.offset - scores().double().mean().item()


# ---- the stage ------------------------------------------------------------------------------------------------------


def train_reward_model(config: RewardModelConfig) -> Path:
    """Train, evaluate, centre and write metrics.jsonl, held_out.json / .png and the model; returns its folder,
    `run.out`/reward_model. Every rank calls."""
    with claimed_run(config, "runs/reward-model") as (agreed, out):
        return _train(agreed, out)


def _train(config: RewardModelConfig, out: Path) -> Path:
    tokenizer = load_tokenizer(config.tokenizer or named_model(config.model))

    def load(source: str) -> list[Pair]:
        return load_pairs(source, tokenizer, config.max_tokens, bad_rows=config.bad_rows)[0]

    pairs = load(config.data)
    held_out = load(config.eval_data) if config.eval_data else []
    centred: list[Text] = []
    if config.centre_data:
        centred, _ = load_texts(
            config.centre_data, tokenizer, config.max_tokens, overlong="drop", bad_rows=config.bad_rows
        )

    def loss_of(trainee: RewardTrainee, rows: Sequence[int], batch: Sequence[int]) -> tuple[Tensor, Metrics]:
        own, all_ = [pairs[row] for row in rows], [pairs[row] for row in batch]
        with autocast(config.autocast, trainee.reward_model.model.device):
            return pair_loss(trainee, own, all_, margin=config.margin, lm_coef=config.lm_coef, impl=config.impl)

    def evaluate(trainee: RewardTrainee) -> dict[str, float]:
        if not held_out:
            return {}
        figures = evaluate_pairs(trainee.reward_model, held_out, config.micro_tokens)
        return {f"eval_{name}": figures[name] for name in ("accuracy", "rank_loss", "score_gap", "ece")}

    read = fingerprint_rows([*p.prompt, -1, *p.chosen, -1, *p.rejected] for p in pairs)
    task = Task([tokens_of(pair) for pair in pairs], loss_of, evaluate, read)
    trained = run_loop(RewardTrainee.load(config), task, config, out)

    def centred_scores() -> Tensor:
        with trained.gathered() as whole:
            return score_texts(whole.reward_model, centred, config.micro_tokens)

    if centred:
        centre_scores(trained.module.reward_model, centred_scores, unit_std=config.unit_std)
    if held_out:
        with trained.gathered() as whole:
            figures = evaluate_pairs(whole.reward_model, held_out, config.micro_tokens)
        if ranks.rank() == 0:
            (out / "held_out.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
            plot_held_out(figures, out / "held_out.png")
    part = "reward_model.model"
    return export_model(trained, tokenizer, out / "reward_model", part=part, beside_adapters=False)
