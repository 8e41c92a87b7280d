"""What a model weighs and what its forward and backward hold, found without weights.

Parameters are counted on the meta device (shapes and dtypes, no storage). Activations are counted by running forward
and backward of a cut of two and of three blocks there and going on in a straight line to the real depth: so any family
is counted as its own code allocates. The language-model head is not run here: its loss keeps one chunk
of logits (memory.py). Nothing is downloaded; imports torch on first use."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ppomax.planning.live_bytes import live_bytes

if TYPE_CHECKING:
    from ppomax.rollout.slots import Prompt

ATTENTION = "ppomax_plan"
RANK = 8
"""Of the adapters that are run: what their states hold beside those of the layers is little whatever it is."""
TRACED_DEPTHS = (2, 3)
"""Depths that are run; more blocks cost what the third costs more than the second."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of one model, in elements."""

    params: int
    """All parameters, tied ones once."""
    block: int
    """One decoder block."""
    head: int
    """Output head, (V, D); 0 for a scorer. With tied embeddings the same elements are in `embedding`."""
    embedding: int
    largest: int
    """The largest single parameter."""
    layers: int
    hidden: int
    vocab: int
    kv_token: int
    """Keys and values of one token over all blocks."""
    linears: tuple[tuple[str, int, int], ...]
    """(name, in, out) of the linear layers of one block; what adapters attach to."""
    tied: bool

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of low-rank adapters of all blocks on the linear layers `targets` (none: every one)."""
        chosen = [(i, o) for name, i, o in self.linears if not targets or name in targets]
        return self.layers * rank * sum(i + o for i, o in chosen)


@dataclass(frozen=True)
class Held:
    """Bytes that a trunk holds beyond parameters and their gradients."""

    forward: int
    """Peak of a forward without gradient."""
    saved: int
    """Live between forward and backward: what the backward needs, and the hidden states."""
    peak: int
    """Peak of forward and backward."""


@lru_cache(maxsize=64)
def sizes_of(config: str, kind: str) -> ModelSizes:
    """Sizes of the model that the HF configuration `config` (JSON) describes. kind: `causal_lm` or `scorer`."""
    import torch

    from ppomax.models.trunk import nested_blocks_of
    from ppomax.rollout.arena import cache_shape

    hf = _hf_config(config, None)
    with torch.device("meta"):
        model = _build(hf, kind, torch.bfloat16)
    block, text, shape = nested_blocks_of(model)[0], hf.get_text_config(), cache_shape(hf)
    head = model.get_output_embeddings() if kind == "causal_lm" else None
    sizes = [p.numel() for p in model.parameters()]
    linears = [(n, *size) for n, m in block.named_modules() if (size := linear_sizes(m)) is not None]
    return ModelSizes(
        params=sum(sizes),
        block=sum(p.numel() for p in block.parameters()),
        head=0 if head is None else head.weight.numel(),
        embedding=model.get_input_embeddings().weight.numel(),
        largest=max(sizes),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        kv_token=2 * shape.layers * shape.kv_heads * shape.head_dim,
        linears=tuple((n.rpartition(".")[2], i, o) for n, i, o in linears),
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
    )


def held(
    config: str,
    dtype: str,
    sequences: int,
    length: int,
    trained: int,
    targets: tuple[str, ...] | None,
    recomputed: bool = False,
    fused: bool = False,
) -> Held:
    """Bytes that the trunk holds for a padded batch (sequences, length). `trained`: how many of the last blocks take
    gradients (all of them: the embedding too); `targets`: adapters on these linear layers alone, () for every one;
    `recomputed`: blocks run again in the backward (recompute.py); `fused`: on our CPU kernels (fused_trunk.py)."""
    depth = _hf_config(config, None).num_hidden_layers
    whole = trained >= depth
    depths = [depth] if depth <= TRACED_DEPTHS[1] else list(TRACED_DEPTHS)
    shape = _trunk_only(config, max(depths))
    run = [
        _trace(shape, dtype, sequences, length, d, whole or targets is not None, targets, recomputed, fused)
        for d in depths
    ]
    if len(run) == 1:
        return run[0]
    a, b = run
    more = (trained if not whole else depth) - TRACED_DEPTHS[0]
    return Held(
        forward=b.forward,
        saved=a.saved + more * (b.saved - a.saved),
        peak=a.peak + more * (b.peak - a.peak),
    )


def decoded(config: str) -> str:
    """The same model as the rollout runs it: its own attention caps scores without holding them."""
    knobs = json.loads(config)
    return json.dumps(knobs | {"attn_logit_softcapping": None}) if knobs.get("attn_logit_softcapping") else config


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of what an adapter goes on; None: it is no linear layer."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (int(module.nx), int(module.nf)) if isinstance(module, Conv1D) else None


@lru_cache(maxsize=64)
def _trace(
    config: str,
    dtype: str,
    sequences: int,
    length: int,
    depth: int,
    embedding: bool,
    targets: tuple[str, ...] | None,
    recomputed: bool,
    fused: bool,
) -> Held:
    import torch
    from transformers import AutoModel

    from ppomax.models.fused_trunk import fused_shapes
    from ppomax.models.recompute import recompute
    from ppomax.models.trunk import nested_blocks_of

    register_attention()
    with torch.device("meta"):
        trunk = AutoModel.from_config(_hf_config(config, depth), dtype=getattr(torch, dtype)).requires_grad_(False)
        (trunk if embedding and targets is None else nested_blocks_of(trunk)).requires_grad_(targets is None)
        for name, module in nested_blocks_of(trunk).named_modules():
            adapted = targets is not None and (not targets or name.rpartition(".")[2] in targets)
            if adapted and (size := linear_sizes(module)) is not None:
                _adapt(module, *size)
        for p in trunk.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        if recomputed:
            recompute(nested_blocks_of(trunk))
        ids = torch.zeros(sequences, length, dtype=torch.int64)
        with fused_shapes(trunk) if fused else nullcontext(), live_bytes("meta") as live:
            with torch.no_grad():
                trunk(input_ids=ids, use_cache=False)
            forward = live.peak
            live.peak = live.now
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
            saved = live.now
            hidden.backward(torch.empty_like(hidden))
    return Held(forward, saved, live.peak)


def _adapt(layer: Any, inputs: int, outputs: int) -> None:
    """Add a low-rank adapter to a linear layer, as peft computes it."""
    import torch
    from torch.nn.functional import linear

    plain = layer.forward
    down, up = (torch.empty(shape, dtype=layer.weight.dtype) for shape in ((RANK, inputs), (outputs, RANK)))
    down.requires_grad_(), up.requires_grad_()
    layer.forward = lambda x: plain(x) + linear(linear(x, down), up) * 2.0


@lru_cache(maxsize=64)
def packs(config: str, kind: str, dtype: str) -> bool:
    """Whether a CPU's scoring and update take the model's sequences without padding."""
    import torch

    from ppomax.models.varlen import why_not_varlen

    with torch.device("meta"):
        model = _build(_hf_config(config, None), kind, getattr(torch, dtype))
    return not why_not_varlen(model, torch.device("cpu"))


def register_attention() -> None:
    """Teach transformers an attention of no content that holds what fused attention holds: its inputs, its output and
    one number a row, never a (T, T) matrix; but all of those where scores are capped, which no fused attention does."""
    import torch
    from torch import Tensor
    from transformers import AttentionInterface

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            b, h, t, d = q.shape
            out = q.new_empty(b, t, h, d)
            ctx.save_for_backward(q, k, v, out, q.new_empty(b, h, t, dtype=torch.float32))
            return out

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **named: Any) -> Any:
        if not named.get("softcap"):
            return Fused.apply(query, key, value), None
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = torch.tanh(query @ key.mT * 0.1 / 50.0) * 50.0
        weights = (scores + torch.zeros_like(scores[:1, :1])).softmax(-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION, attention)


def cache_bytes(config: str, dtype: str, prompts: list[Prompt], slots: int, limits: tuple[int, int | None]) -> int:
    """Bytes of the rollout's KV arena for these prompts; limits: response tokens, and `rollout.cache_tokens`."""
    import torch
    from ppomax_kernels.internal.paged_attention import PAGE

    from ppomax.rollout.sizes import arena_bytes, arena_pages

    pages = arena_pages(prompts, slots, *limits, PAGE)
    return arena_bytes(_hf_config(config, None), pages, PAGE, getattr(torch, dtype))


@lru_cache(maxsize=64)
def packed_weight_bytes(config: str, dtype: str, cpu: bool) -> int:
    """Bytes of weights that the rollout holds a second time: packed on a CPU, where they are few, joined on a GPU."""
    import torch

    from ppomax.rollout.gpu_trunk import joined, joined_bytes
    from ppomax.rollout.packed_weights import packed_bytes

    with torch.device("meta"):
        model = _build(_hf_config(config, None), "causal_lm", getattr(torch, dtype))
    return packed_bytes(model, "native") if cpu else joined_bytes(joined(model))


def prefill_tokens(cpu: bool) -> int:
    """Prompt tokens that one forward of the rollout takes at most, unless a single prompt is longer."""
    from ppomax.rollout import slots

    return slots.prefill_tokens("cpu" if cpu else "cuda")


def _trunk_only(config: str, most: int) -> str:
    """The same for all models whose blocks are alike, so that policy and critic are run once: cut to `most` blocks, in
    every list that has one entry a block too."""
    apart = ("architectures", "id2label", "label2id", "num_labels", "score_offset", "transformers_version", "dtype")
    knobs = {k: v for k, v in sorted(json.loads(config).items()) if k not in apart}
    depths = [knobs[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(knobs.get(k), int)]
    if not depths or depths[0] <= most:
        return json.dumps(knobs)
    for key, value in knobs.items():
        if key in ("num_hidden_layers", "n_layer", "num_layers"):
            knobs[key] = most
        elif isinstance(value, list) and len(value) == depths[0]:
            knobs[key] = value[:most]
    return json.dumps(knobs)


def doubled(config: str) -> str:
    """The same model, twice as deep."""
    knobs = json.loads(config)
    names = ("num_hidden_layers", "n_layer", "num_layers")
    depth = next(v for k in names if isinstance(v := knobs.get(k), int))
    each = {k: v + v for k, v in knobs.items() if isinstance(v, list) and len(v) == depth}
    return json.dumps(knobs | each | {k: 2 * depth for k in names if knobs.get(k) == depth})


def _hf_config(config: str, depth: int | None) -> Any:
    """The HF configuration object of the JSON text `config`, cut to `depth` blocks."""
    from transformers import AutoConfig

    from ppomax.models import with_blocks

    knobs = json.loads(config)
    hf = AutoConfig.for_model(knobs.pop("model_type"), **knobs)
    if depth is not None:
        hf = with_blocks(hf, slice(0, depth))
    hf.pad_token_id = None  # some models look for it among the tokens, which are not there
    hf._attn_implementation = ATTENTION if depth else "eager"  # which every family has; it is not run
    return hf


def _build(hf: Any, kind: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from ppomax.models.scorer_class import auto_scorer

    hf.num_labels = 1
    auto = AutoModelForCausalLM if kind == "causal_lm" else auto_scorer(hf)
    return auto.from_config(hf, dtype=dtype)
