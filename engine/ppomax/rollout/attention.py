"""Attention of a rollout, as a function of transformers' AttentionInterface: it takes the keys that a layer has just
made, puts them into the arena and attends over each token's own sequence. One implementation a phase:

    native   CPUs: ppomax_kernels.internal.paged_attention, which reads the pages where they lie
    triton   GPUs: paged_decode for next tokens, torch's attention over the fresh keys for prompts
    sdpa     elsewhere: pages gathered for torch's scaled_dot_product_attention
    ref      what `impl: ref` asks for

No mask is made: transformers makes none for an attention that its mask interface does not know, and where a token
stands is in `Step`. So a layer must name its window and cap in the call; one that works otherwise (attention sinks,
biases, keys of another layer) is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from ppomax_kernels.backends import reference
from ppomax_kernels.internal.paged_attention import PAGE, paged_attention
from ppomax_kernels.internal.paged_decode import paged_decode, serves, write_row_pages
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ppomax.models import base_of
from ppomax.rollout.arena import ROW_PAGE, Arena, Step, cache_shape
from ppomax.rollout.attention_borrowed import AttentionTerms, attend_prompts, decode_sdpa

NAME = "ppomax_rollout"
LAYER_TYPES = ("full_attention", "sliding_attention")
UNSERVED_ARGUMENTS = ("s_aux", "position_bias", "alibi", "head_mask", "cu_seq_lens_q")
"""Arguments of some models' attention that change its result and that the arena's does not take."""


class UnsupportedModel(ValueError):
    """A model whose attention cannot take the arena."""


class Attention:
    """The arena and its implementation for one phase: what `rollout_attention` works on."""

    def __init__(self, model: PreTrainedModel, arena: Arena, name: str):
        self.model, self.arena, self.name = model, arena, name
        self.step: Step | None = None
        self.checked: set[int] = set()
        self.terms: dict[int, tuple[float, int, float]] = {}
        """Of each layer: scale, window and cap."""
        self.witness: list[Tensor] | None = None
        """Takes the queries, keys and values that are attended with, if somebody wants them."""

    def check_all_served(self) -> None:
        """UnsupportedModel if a layer of the arena saw no attention in the forward just run (looked at once)."""
        if len(self.checked) < len(self.arena.layers):
            missing = [i for i in range(len(self.arena.layers)) if i not in self.checked]
            raise UnsupportedModel(
                f"rollout: layers {missing} of {type(self.model).__name__} did not attend through the KV arena; use "
                "another architecture"
            )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scale: float, window: int, softcap: float
    ) -> Tensor:
        """query (N, H, D), key and value (N, G, D) of the step's tokens -> (N, H, D)."""
        step = self.step
        assert step is not None
        if self.witness is not None:
            self.witness += [query, key, value]
        pages, where = self.arena.stores[layer], (step.tables, step.slots, step.positions)
        terms = AttentionTerms(scale, window, softcap)
        if self.name in ("native", "ref"):
            impl = "ref" if self.name == "ref" else "cpu"
            return paged_attention(query, key, value, *pages, *where, **terms._asdict(), impl=impl)
        n, parts = step.decoding, []
        if self.name == "sdpa":
            reference.write_pages(key, value, *pages, *where)
        elif step.prompts:
            write_row_pages(key[n:], value[n:], *pages, step.tables, step.slots[n:], step.positions[n:], impl="triton")
        if n and self.name == "sdpa":
            parts.append(decode_sdpa(query[:n], pages, step, terms))
        elif n:
            rows = (query[:n], key[:n], value[:n], *pages, step.tables, step.slots[:n], step.positions[:n])
            parts.append(paged_decode(*rows, **terms._asdict(), impl="triton"))
        if step.prompts:
            parts.append(attend_prompts(query[n:], key[n:], value[n:], step, terms))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attend_as_before(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """`attend` of a layer that was checked, with the terms that it had then."""
        return self.attend(query, key, value, layer, *self.terms[layer])


_CURRENT: ContextVar[Attention] = ContextVar("ppomax_rollout_attention")


def choose(model: PreTrainedModel, impl: str = "auto") -> str:
    """The implementation for this model's device and dtype: native, triton, sdpa or ref."""
    if impl == "ref":
        return "ref"
    if model.device.type == "cpu":
        return "native"
    ours = model.device.type == "cuda" and serves(cache_shape(model.config).head_dim, model.dtype)
    return "triton" if ours else "sdpa"


def page_of(name: str) -> int:
    """Tokens of a page for an implementation."""
    return ROW_PAGE if name == "triton" else PAGE


def check_model(model: PreTrainedModel) -> None:
    """UnsupportedModel if the model's attention is not reached through transformers' attention interface, or has
    layers that are neither full nor sliding-window attention."""
    name, text = type(model).__name__, model.config.get_text_config()
    if not getattr(base_of(model), "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"rollout: the attention of {name} is not reached through transformers' attention interface, so it cannot "
            "take the KV arena; use an architecture that supports attention backends (Llama, Qwen, Mistral, Gemma, "
            "GPT-2 ...)"
        )
    other = sorted({t for t in getattr(text, "layer_types", None) or () if t not in LAYER_TYPES})
    if other or getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", False):
        what = f"layers of type {', '.join(other)}" if other else "attention that is not causal"
        raise UnsupportedModel(
            f"rollout: {name} has {what}, and the KV arena serves causal full and sliding-window attention; use "
            "another architecture"
        )


@contextmanager
def arena_attention(model: PreTrainedModel, arena: Arena, name: str) -> Iterator[Attention]:
    """Inside, the model's layers attend through `arena`; afterwards its attention is what it was."""
    AttentionInterface.register(NAME, rollout_attention)
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]
    before = [c._attn_implementation_internal for c in configs]
    attention = Attention(model, arena, name)
    token = _CURRENT.set(attention)
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield attention
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _CURRENT.reset(token)


def rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """One layer: query (1, H, N, D), key and value (1, G, N, D) of the step's tokens -> (1, N, H, D)."""
    now = _CURRENT.get()
    layer = now.arena.waiting
    if layer is None or layer not in now.checked:
        refuse = _refusal(now, module, key, value, attention_mask, sliding_window, rest)
        if refuse or layer is None:
            raise UnsupportedModel(
                f"rollout: {type(now.model).__name__}, {type(module).__name__}: {refuse}; the KV arena cannot serve "
                "it, use another architecture"
            )
        now.checked.add(layer)
    now.arena.waiting = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    now.terms[layer] = (scale, sliding_window or 0, softcap or 0.0)
    return now.attend(q, k, v, layer, *now.terms[layer])[None], None


def _refusal(
    now: Attention,
    module: nn.Module,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int | None,
    rest: dict[str, Any],
) -> str | None:
    """Why this call cannot be served, or None: looked at once a layer, in the first forward."""
    layer, shape, config = now.arena.waiting, now.arena.shape, now.model.config.get_text_config()
    if layer is None:
        return "a layer attends to keys that it did not hand to the cache in this forward"
    got = (key.shape[1], key.shape[3], value.shape[3])
    if got != (shape.kv_heads, shape.head_dim, shape.head_dim):
        return (
            f"layer {layer} keeps (key heads, key width, value width) = {got}, the config says "
            f"{(shape.kv_heads, shape.head_dim, shape.head_dim)}"
        )
    unserved = [name for name in UNSERVED_ARGUMENTS if rest.get(name) is not None]
    if unserved or mask is not None or getattr(module, "is_causal", True) is False:
        return f"layer {layer} attends with {', '.join(unserved) or 'a mask of its own'}"
    types = getattr(config, "layer_types", None)
    configured = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    wanted = configured if types is None or types[layer] == "sliding_attention" else None
    if (wanted or 0) != (window or 0):
        return f"layer {layer} has a sliding window of {wanted} in the config, and attends with {window}"
    return None
