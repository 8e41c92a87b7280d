"""Policy, frozen reference, critic and reward model from Hugging Face checkpoints, behind one packed face.

A batch is one row of tokens (N,) with cu_seqlens (S+1,) int32: sequence s is tokens[cu_seqlens[s]:cu_seqlens[s+1]].
    hidden = packed_hidden(model, tokens, cu_seqlens)      (N, D), what the model's head sees
    logits = head_of(model).logits(hidden)                 (N, V); losses take hidden and weight instead, without logits
    values = critic(tokens, cu_seqlens)                    (N,) fp32: V(s) after reading each token
    scores = reward_model.scores(tokens, cu_seqlens)       (S,) fp32: the value at each sequence's last token
Critic and reward model are one kind of module, a `*ForSequenceClassification` with a single output named `score`; the
critic reads it everywhere, the reward model at the last token. The scalar head runs in fp32 whatever the trunk's dtype.
Left out on purpose: encoder-decoders, quantised loading. Adapters: adapters.py; top blocks alone: branch.py.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppomax.loading import load_partitioned, whole

ModelSource = str | Path | PreTrainedModel


# ---- packed forward -------------------------------------------------------------------------------------------------


def packed_hidden(model: PreTrainedModel, tokens: Tensor, cu_seqlens: Tensor, *, layout: str = "auto") -> Tensor:
    """Last hidden states of a packed batch; equals running the base model on each sequence alone and concatenating.

    tokens (N,) int64; cu_seqlens (S+1,) int32 with cu_seqlens[0] = 0, cu_seqlens[-1] = N, every length >= 1, both on
    the model's device. Returns hidden (N, D) in the model's dtype, differentiable. One forward of the base model
    whatever the lengths, so ranks of a sharded run stay in step.

    layout: "packed" feeds one row with positions that restart (attention is kept inside each sequence by transformers'
    packed detection); "padded" feeds (S, T) with padding on the right, which causal attention never looks at, so that
    no mask is needed. "auto" is packed for flash-attention, which reads variable lengths, and padded for the rest,
    where a packed row would cost N x N attention. Raises TypeError and ValueError for malformed batches.
    """
    if tokens.dtype != torch.int64:
        raise TypeError(f"packed_hidden: tokens must be int64, got {tokens.dtype}; use tokens.long()")
    if tokens.dim() != 1:
        raise ValueError(
            f"packed_hidden: tokens must be (N,), got {tuple(tokens.shape)}; pack the sequences into one row"
        )
    base = base_of(model)

    def run(ids: Tensor, **positions: Tensor) -> Tensor:
        return base(input_ids=ids, use_cache=False, **positions).last_hidden_state  # type: ignore[no-any-return]

    return packed_forward(run, tokens, cu_seqlens, model.config, layout=layout)


def packed_forward(
    run: Callable[..., Tensor], inputs: Tensor, cu_seqlens: Tensor, config: Any, *, layout: str = "auto"
) -> Tensor:
    """`cat([run(x[None])[0] for x in sequences of inputs])` in one call of `run`.

    inputs: tokens (N,) or hidden states (N, D), with cu_seqlens as in `packed_hidden`, which also explains `layout`.
    run(x (B, T) or (B, T, D), position_ids=(B, T) if packed) -> hidden (B, T, D) of a causal model; config: its HF
    config. Returns (N, D)."""
    lengths = _checked_lengths(inputs, cu_seqlens)
    longest = int(lengths.max())
    _check_window(config, longest)
    if layout == "auto":
        layout = "packed" if "flash" in str(config._attn_implementation) else "padded"
    starts = cu_seqlens[:-1].long()
    positions = torch.arange(inputs.shape[0], device=inputs.device) - torch.repeat_interleave(starts, lengths)
    if layout == "packed":
        return run(inputs[None], position_ids=positions[None])[0]
    if layout != "padded":
        raise ValueError(f"packed_hidden: layout must be 'auto', 'packed' or 'padded', got {layout!r}")
    rows = torch.repeat_interleave(torch.arange(lengths.numel(), device=inputs.device), lengths)
    slots = rows * longest + positions
    # The fill (id 0, or zeros) is never attended to by anything that is kept.
    padded = inputs.new_zeros(lengths.numel() * longest, *inputs.shape[1:]).index_copy(0, slots, inputs)
    return run(padded.unflatten(0, (-1, longest))).flatten(0, 1).index_select(0, slots)


def _checked_lengths(inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"packed_hidden: cu_seqlens must be int32, got {cu_seqlens.dtype}; use cu_seqlens.int()")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"packed_hidden: cu_seqlens must be (S+1,) with S >= 1, got {tuple(cu_seqlens.shape)}")
    lengths = cu_seqlens.diff().long()
    first, last, shortest = torch.stack([cu_seqlens[0].long(), cu_seqlens[-1].long(), lengths.min()]).tolist()
    if first != 0 or last != inputs.shape[0] or shortest < 1:
        raise ValueError(
            f"packed_hidden: cu_seqlens must rise from 0 to N = {inputs.shape[0]} with every length >= 1, "
            f"got first {first}, last {last}, shortest {shortest}; drop empty sequences before packing"
        )
    return lengths


def _check_window(config: Any, longest: int) -> None:
    window = getattr(config, "max_position_embeddings", None)
    if window is not None and longest > window:
        raise ValueError(
            f"packed_hidden: the longest sequence has {longest} tokens, the model's window is {window} "
            "(config.max_position_embeddings); shorten prompts or responses"
        )


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The trunk without its head (`model.base_model`): what gives hidden states."""
    base: PreTrainedModel = model.base_model  # type: ignore[assignment]
    if base is model and hasattr(model, "lm_head"):
        raise ValueError(f"{type(model).__name__} has no separate base model; use a *ForCausalLM of transformers")
    return base


def blocks_name(base: PreTrainedModel) -> str:
    """Name of the list of decoder blocks in a base model: `layers`, `h` ..., found by its length."""
    depth = base.config.num_hidden_layers
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name
    raise ValueError(
        f"{type(base).__name__} has no list of {depth} blocks (config.num_hidden_layers) among its direct children; "
        "use a decoder-only model whose base model holds its blocks"
    )


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a causal LM, bottom first, whatever its family calls them."""
    base = base_of(model)
    return getattr(base, blocks_name(base))  # type: ignore[no-any-return]


# ---- language-model head --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """Hidden (N, D) into logits (N, V): softcap * tanh(z / softcap) with z = scale * (hidden @ weight.T + bias)."""

    weight: Tensor
    """(V, D), the model's own parameter (tied or not), so that gradients reach it."""
    bias: Tensor | None = None
    """(V,) or None."""
    softcap: float | None = None
    """Gemma's final_logit_softcapping; None where the model has none."""
    scale: float = 1.0
    """Cohere's logit_scale, 1 / Granite's logits_scaling; 1 for most. A kernel takes it as temperature = 1 / scale."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V); the readable form, for tests and sampling. Losses go straight from hidden."""
        return self.capped(nn.functional.linear(hidden, self.weight, self.bias))

    def capped(self, z: Tensor) -> Tensor:
        """Scale and softcap over a product `hidden @ weight.T + bias` that was made elsewhere."""
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal LM, as its config describes it; `check_head` holds it against the model's logits."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"head_of: {type(model).__name__} has no output embeddings; load it as a causal language model"
        )
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), float(softcap) if softcap else None, scale)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ValueError if head_of(model) on the hidden states of three tokens does not give the model's own logits."""
    tokens = torch.arange(3, device=model.device) % head_of(model).weight.shape[0]
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=model.device)
    training = model.training
    model.eval()
    got = head_of(model).logits(packed_hidden(model, tokens, cu_seqlens)).float()
    want = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    model.train(training)
    tolerance = (1e-4 if model.dtype == torch.float32 else 5e-2) * max(1.0, want.abs().max().item())
    if got.shape != want.shape or not (got - want).abs().max().item() <= tolerance:
        raise ValueError(
            f"{type(model).__name__}: hidden @ head weight does not give the model's logits; its head does "
            "something that head_of does not know. Use an architecture whose head is linear (with softcap or scale), "
            "or extend head_of."
        )


# ---- loading --------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """AutoTokenizer.from_pretrained(path); data.check_tokenizer says whether it is fit for PPO."""
    return AutoTokenizer.from_pretrained(_local(path), trust_remote_code=trust_remote_code)


def load_policy(
    source: ModelSource,
    dtype: torch.dtype = torch.float32,
    *,
    trust_remote_code: bool = False,
    cut: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A causal LM from a HF directory, a hub name or a model in memory (cast in place), dropout off, head checked.

    Dropout is set to zero for good: with it the update's log-probs would not equal the rollout's. `options` go to
    from_pretrained (attn_implementation, device_map ...). Weights are read from safetensors only. `cut`: the DeepSpeed
    settings of a model that is read into ZeRO-3's partitions, each rank its own (loading.py).
    """
    if isinstance(source, PreTrainedModel):
        model = source.to(dtype)  # type: ignore[arg-type]
    elif cut is not None:
        model = load_partitioned(_local(source), dtype, settings=cut)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            _local(source), dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"load_policy: {type(model).__name__} is an encoder-decoder; a decoder-only model is wanted")
    disable_dropout(model)
    with whole(model):
        check_head(model)
    return model


def load_reward_model(
    source: ModelSource | RewardModel,
    dtype: torch.dtype = torch.float32,
    *,
    trust_remote_code: bool = False,
    cut: dict[str, Any] | None = None,
    **options: Any,
) -> RewardModel:
    """A RewardModel from an AutoModelForSequenceClassification checkpoint with num_labels = 1 and a `score` head; `cut`
    as in load_policy."""
    if isinstance(source, RewardModel):
        return source.to(dtype)  # type: ignore[arg-type]
    if isinstance(source, PreTrainedModel):
        return RewardModel(source.to(dtype))  # type: ignore[arg-type]
    path = _local(source)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if config.num_labels != 1:
        raise ValueError(
            f"load_reward_model: {path} has num_labels = {config.num_labels}, a reward model has 1 "
            "(a `score` head with one output); train one with `ppomax reward-model`"
        )
    if cut is not None:
        return RewardModel(load_partitioned(path, dtype, "sequence_classification", settings=cut))
    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **options
    )
    return RewardModel(model)


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding (V, D), which is the head's weight too where the two are tied."""
    return model.get_input_embeddings().weight  # type: ignore[return-value]


def freeze(model: nn.Module) -> nn.Module:
    """Turn gradients off and evaluation mode on, in place; returns the model."""
    return model.requires_grad_(False).eval()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, in modules and in the config (where attention dropout lives)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout"):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)


def _local(path: str | Path) -> str:
    """A folder that exists, or a hub name (owner/name); anything else is a mistyped path and is named as such."""
    text = str(path)
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file() and not (Path(text) / "tokenizer_config.json").is_file():
            raise FileNotFoundError(
                f"{text} holds neither config.json nor tokenizer_config.json; give a HF model folder"
            )
        return text
    looks_like_hub_name = text.count("/") <= 1 and not text.startswith((".", "/", "~"))
    if not looks_like_hub_name:
        raise FileNotFoundError(
            f"no model folder {text}; give a folder with config.json and model.safetensors, or a hub name"
        )
    return text


# ---- critic and reward model ----------------------------------------------------------------------------------------


class Critic(nn.Module):
    """A scalar at every token: values = (score head in fp32)(hidden) + score_offset.

    Holds a HF `*ForSequenceClassification` as `.model`, so that it saves and loads as one. `config.score_offset` is the
    centring of a reward model (see stages/reward_model.py); HF score heads have no bias, hence it lives in the config.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise ValueError(
                f"{type(model).__name__} has no `score` head with one output; load it by "
                "AutoModelForSequenceClassification with num_labels=1, or build one by make_critic(policy)"
            )
        disable_dropout(model)
        self.model = model

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
        return nn.functional.linear(hidden.float(), self.score.weight.float(), bias)[:, 0] + self.offset


class RewardModel(Critic):
    """A Critic read at the last token of each sequence, which is the last response token (EOS if the model stopped)."""

    def scores(self, tokens: Tensor, cu_seqlens: Tensor, *, layout: str = "auto") -> Tensor:
        """tokens (N,), cu_seqlens (S+1,) -> scores (S,) fp32."""
        hidden = packed_hidden(self.model, tokens, cu_seqlens, layout=layout)
        return self.values_of(hidden.index_select(0, cu_seqlens[1:].long() - 1))


def make_critic(
    source: ModelSource | Critic,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    cut: dict[str, Any] | None = None,
) -> Critic:
    """A trainable critic from a reward model (copied, score head and centring included) or from a policy's trunk.

    From a policy (a causal LM) the score head is new, with weights drawn from N(0, (1/(D+1))^2), which starts values
    near zero; `seed` fixes the draw. A path is read as what its config names: ForCausalLM or ForSequenceClassification;
    with `cut` into ZeRO-3's partitions, as in load_policy.
    """
    if isinstance(source, Critic):
        return Critic(copy.deepcopy(source.model).to(dtype)).requires_grad_(True)  # type: ignore[arg-type]
    if isinstance(source, PreTrainedModel):
        if hasattr(source, "score"):
            return Critic(copy.deepcopy(source).to(dtype)).requires_grad_(True)  # type: ignore[arg-type]
        return Critic(_score_model_of(source, seed).to(dtype)).requires_grad_(True)  # type: ignore[arg-type]
    architectures = AutoConfig.from_pretrained(_local(source)).architectures or []
    scorer = any(name.endswith("ForSequenceClassification") for name in architectures)
    if cut is not None:
        options: dict[str, Any] = {"settings": cut, "new_head": not scorer, "seed": seed}
        model = load_partitioned(_local(source), dtype, "sequence_classification", **options)
        return Critic(model).requires_grad_(True)
    if scorer:
        return Critic(load_reward_model(source, dtype).model).requires_grad_(True)
    return Critic(_score_model_of(load_policy(source, dtype), seed)).requires_grad_(True)


def make_reward_model(policy: PreTrainedModel, *, layers: int | None = None, seed: int = 0) -> RewardModel:
    """A new reward model on a copy of the policy's trunk, its first `layers` blocks where given, with a fresh head."""
    model = _score_model_of(policy, seed)
    if layers is not None:
        depth = model.config.num_hidden_layers
        if not 1 <= layers <= depth:
            raise ValueError(f"make_reward_model: layers must be in 1..{depth} (the policy's depth), got {layers}")
        base = base_of(model)
        blocks = blocks_name(base)
        setattr(base, blocks, getattr(base, blocks)[:layers])
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
    return RewardModel(model)


def _score_model_of(policy: PreTrainedModel, seed: int) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"transformers has no *ForSequenceClassification for {type(config).__name__}, so no critic or reward "
            "model can be made from this policy; give a critic or reward model of another architecture with the same "
            "tokenizer"
        )
    model = AutoModelForSequenceClassification.from_config(
        config, attn_implementation=policy.config._attn_implementation, dtype=policy.dtype
    )
    if not hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} names its head otherwise than `score`; critics need a decoder-only model"
        )
    model.base_model.load_state_dict(policy.base_model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    width = model.score.in_features
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(1, width, generator=generator) / (width + 1))
        if model.score.bias is not None:
            model.score.bias.zero_()
    return model.to(policy.device)


def save_model(model: PreTrainedModel | Critic, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> Path:
    """Write a HF directory (safetensors, config, tokenizer) that the Auto classes load; returns the path.

    Written beside its place and renamed, so that a folder of that name is never half a model. An existing folder is
    replaced."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    hf = model.model if isinstance(model, Critic) else model
    hf.save_pretrained(part, safe_serialization=True)
    tokenizer.save_pretrained(part)
    if path.exists():
        shutil.rmtree(path)
    os.replace(part, path)
    return path
