"""Critic and reward model: one kind of module, a `*ForSequenceClassification` with a single output named `score`.

    values = critic(tokens, cu_seqlens)                    (N,) fp32: V(s) after reading each token
    scores = reward_model.scores(tokens, cu_seqlens)       (S,) fp32: the value at each sequence's last token
The critic reads it everywhere, the reward model at the last token. The head runs in fp32 whatever the trunk's dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from ppomax.models.files import model_config
from ppomax.models.packed import packed_hidden
from ppomax.models.partitioned import Kind, gathered, in_parts, load_partitioned
from ppomax.models.policy import load_policy
from ppomax.models.score_head import Scale, draw_score_head
from ppomax.models.scorer_class import auto_scorer
from ppomax.models.sources import ModelSource, read_whole
from ppomax.models.transfers import sent
from ppomax.models.trunk import base_of, blocks_name, blocks_of, train_as_scored, with_blocks

SCORER: Kind = "sequence_classification"


def load_reward_model(
    source: ModelSource | RewardModel,
    dtype: torch.dtype = torch.float32,
    *,
    trust_remote_code: bool = False,
    zero: dict[str, Any] | None = None,
    **options: Any,
) -> RewardModel:
    """A RewardModel from an AutoModelForSequenceClassification checkpoint with num_labels = 1 and a `score` head;
    `zero` as in load_policy."""
    if isinstance(source, RewardModel):
        return source.to(dtype)  # type: ignore[arg-type]
    if isinstance(source, PreTrainedModel):
        return RewardModel(source.to(dtype))  # type: ignore[arg-type]
    config = model_config(source, trust_remote_code=trust_remote_code)
    if config.num_labels != 1:
        raise ValueError(
            f"load_reward_model: {source} has num_labels = {config.num_labels}, a reward model has 1 "
            "(a `score` head with one output); train one with `ppomax reward-model`"
        )
    if zero is not None and in_parts(source, SCORER):
        return RewardModel(load_partitioned(source, dtype, "sequence_classification", settings=zero))
    auto = auto_scorer(config)
    return RewardModel(read_whole(auto, source, dtype, trust_remote_code=trust_remote_code, **options))


class Critic(nn.Module):
    """A scalar at every token: values = gain * ((score head in fp32)(hidden) + score_offset) + shift.

    Holds a HF `*ForSequenceClassification` as `.model`, so that it saves and loads as one. `config.score_offset` is the
    centring of a reward model (see stages/reward_model.py); HF score heads have no bias, hence it lives in the config.
    `scale` is what a critic's units ask for: 1 and 0 in a reward model, which gives raw scores.
    """

    raw = True
    """Whether its first values are a reward model's, in raw units; else those of a new head, near 0."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise ValueError(
                f"{type(model).__name__} has no `score` head with one output; load it by "
                "AutoModelForSequenceClassification with num_labels=1, or build one by make_critic(policy)"
            )
        train_as_scored(model)
        self.model, self.scale = model, Scale()

    @property
    def score(self) -> nn.Linear:
        return self.model.score  # type: ignore[return-value]

    @property
    def offset(self) -> float:
        return float(getattr(self.model.config, "score_offset", 0.0))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, *, layout: str = "auto") -> Tensor:
        """tokens (N,), cu_seqlens (S+1,) -> values (N,) fp32; the value at t has seen tokens up to and with t."""
        return self.values_of(packed_hidden(self.model, tokens, cu_seqlens, layout=layout))

    def values_of(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> values (N,) fp32."""
        bias = None if self.score.bias is None else self.score.bias.float()
        found = nn.functional.linear(hidden.float(), self.score.weight.float(), bias)[:, 0]
        return self.scale.of(found + self.offset if self.offset else found)


class RewardModel(Critic):
    """A Critic read at the last token of each sequence, which is the last response token (EOS if the model stopped)."""

    def scores(self, tokens: Tensor, cu_seqlens: Tensor, *, layout: str = "auto") -> Tensor:
        """tokens (N,), cu_seqlens (S+1,) -> scores (S,) fp32."""
        hidden = packed_hidden(self.model, tokens, cu_seqlens, layout=layout)
        return self.values_of(hidden.index_select(0, sent(cu_seqlens[1:].long() - 1, hidden.device)))


def make_critic(
    source: ModelSource | Critic,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    zero: dict[str, Any] | None = None,
) -> Critic:
    """A trainable critic from a reward model (copied, score head and centring included) or from a policy's trunk.

    From a policy (a causal LM) the score head is new, with weights drawn from N(0, (1/(D+1))^2), which starts values
    near zero; `seed` fixes the draw. A path is read as what its config names: ForCausalLM or ForSequenceClassification;
    with `zero` into ZeRO-3's partitions, as in load_policy.
    """
    if isinstance(source, Critic):
        return Critic(copy.deepcopy(source.model).to(dtype)).requires_grad_(True)  # type: ignore[arg-type]
    if isinstance(source, PreTrainedModel):
        if hasattr(source, "score"):
            return Critic(copy.deepcopy(source).to(dtype)).requires_grad_(True)  # type: ignore[arg-type]
        return _new_critic(_score_model_of(source, seed).to(dtype))  # type: ignore[arg-type]
    architectures = model_config(source).architectures or []
    scorer = any(name.endswith("ForSequenceClassification") for name in architectures)
    if zero is not None and in_parts(source, SCORER):
        options: dict[str, Any] = {"settings": zero, "new_head": not scorer, "seed": seed}
        model = load_partitioned(source, dtype, "sequence_classification", **options)
        return Critic(model).requires_grad_(True) if scorer else _new_critic(model)
    if scorer:
        return Critic(load_reward_model(source, dtype).model).requires_grad_(True)
    return _new_critic(_score_model_of(load_policy(source, dtype), seed))


def _new_critic(model: PreTrainedModel) -> Critic:
    """With a head that was just drawn."""
    critic = Critic(model).requires_grad_(True)
    critic.raw = False
    return critic


@torch.no_grad()
def take_length_out(critic: Critic) -> Critic:
    """Divide the head by its length, and multiply `scale.gain` by it: the values stay, and what an optimiser's step of
    a given size does to them no longer depends on the scale that a reward model was trained to."""
    parts = [p for p in (critic.score.weight, critic.score.bias) if p is not None]
    with gathered(critic.score, modify=True):
        length = float(critic.score.weight.float().norm())
        if length > 0:
            for part in parts:
                part.div_(length)
    if length > 0:
        critic.scale.gain *= length
        critic.model.config.score_offset = critic.offset / length
    return critic


def make_reward_model(
    policy: ModelSource,
    dtype: torch.dtype | None = None,
    *,
    layers: int | None = None,
    seed: int = 0,
    zero: dict[str, Any] | None = None,
) -> RewardModel:
    """A new reward model on a copy of the policy's trunk, its first `layers` blocks where given, with a fresh head; a
    path with `zero` is read into ZeRO-3's partitions, as in load_policy. dtype: None keeps the policy's."""
    if isinstance(policy, PreTrainedModel):
        model = _score_model_of(policy, seed)
    elif zero is not None and in_parts(policy, SCORER):
        options: dict[str, Any] = {"settings": zero, "new_head": True, "seed": seed}
        model = load_partitioned(policy, dtype or torch.float32, "sequence_classification", **options)
    else:
        model = _score_model_of(load_policy(policy, dtype or torch.float32), seed)
    if layers is not None:
        depth = model.config.num_hidden_layers
        if not 1 <= layers <= depth:
            raise ValueError(f"make_reward_model: layers must be in 1..{depth} (the policy's depth), got {layers}")
        base = base_of(model)
        setattr(base, blocks_name(base), blocks_of(model)[:layers])
        short = with_blocks(model.config, slice(0, layers))
        model.config.num_hidden_layers = short.num_hidden_layers
        if getattr(short, "layer_types", None):
            model.config.layer_types = short.layer_types
    return RewardModel(model)


def _score_model_of(policy: PreTrainedModel, seed: int) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = auto_scorer(config).from_config(
        config, attn_implementation=policy.config._attn_implementation, dtype=policy.dtype
    )
    if not hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} names its head otherwise than `score`; critics need a decoder-only model"
        )
    model.base_model.load_state_dict(policy.base_model.state_dict())
    model._dropout_given = dict(getattr(policy, "_dropout_given", {}))
    draw_score_head(model.score.weight, seed)
    if model.score.bias is not None:
        torch.nn.init.zeros_(model.score.bias)
    return model.to(policy.device)
