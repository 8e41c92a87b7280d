"""A packed batch through a causal model: one row of tokens (N,) with cu_seqlens (S+1,) int32, sequence s being
tokens[cu_seqlens[s]:cu_seqlens[s+1]].

    hidden = packed_hidden(model, tokens, cu_seqlens)      (N, D), what the model's head sees"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from ppomax.models import varlen
from ppomax.models.transfers import sent
from ppomax.models.trunk import base_of, window_of, window_words


def packed_hidden(model: PreTrainedModel, tokens: Tensor, cu_seqlens: Tensor, *, layout: str = "auto") -> Tensor:
    """Last hidden states of a packed batch; equals running the base model on each sequence alone and concatenating.

    tokens (N,) int64 on the model's device; cu_seqlens (S+1,) int32 with cu_seqlens[0] = 0, cu_seqlens[-1] = N, every
    length >= 1, there or on the host, in which case nothing waits for the device. Returns hidden (N, D) in the model's
    dtype, differentiable. One forward of the base model whatever the lengths, so ranks of a sharded run stay in step.

    layout: "packed" feeds one row with positions that restart (attention is kept inside each sequence by transformers'
    packed detection, or by varlen.py); "padded" feeds (S, T) with padding on the right, which causal attention never
    looks at, so that no mask is needed. "auto" is packed where attention reads variable lengths, and padded for the
    rest, where a packed row would cost N x N attention. Raises TypeError and ValueError for malformed batches.
    """
    if tokens.dtype != torch.int64:
        raise TypeError(f"packed_hidden: tokens must be int64, got {tokens.dtype}; use tokens.long()")
    if tokens.dim() != 1:
        raise ValueError(
            f"packed_hidden: tokens must be (N,), got {tuple(tokens.shape)}; pack the sequences into one row"
        )
    base = base_of(model)

    def run(ids: Tensor, **positions: Any) -> Tensor:
        return base(input_ids=ids, use_cache=False, **positions).last_hidden_state  # type: ignore[no-any-return]

    return packed_forward(run, tokens, cu_seqlens, model.config, layout=layout)


def packed_forward(
    run: Callable[..., Tensor], inputs: Tensor, cu_seqlens: Tensor, config: Any, *, layout: str = "auto"
) -> Tensor:
    """`cat([run(x[None])[0] for x in sequences of inputs])` in one call of `run`.

    inputs: tokens (N,) or hidden states (N, D), with cu_seqlens as in `packed_hidden`, which also explains `layout`.
    run(x (B, T) or (B, T, D), position_ids=(B, T) if packed) -> hidden (B, T, D) of a causal model; config: its HF
    config. Returns (N, D)."""
    lengths = _lengths_of(inputs, cu_seqlens)
    longest = int(lengths.max())
    if longest > window_of(config):
        raise ValueError(
            f"packed_hidden: the longest sequence has {longest} tokens, over {window_words(config)}; shorten prompts "
            "or responses"
        )
    if layout == "auto":
        layout = "padded" if pads(config) else "packed"
    starts = cu_seqlens[:-1].long()
    count, device = inputs.shape[0], inputs.device
    positions = torch.arange(count, device=starts.device) - starts.repeat_interleave(lengths, output_size=count)
    if layout == "packed" and config._attn_implementation == varlen.NAME:
        cu = sent(cu_seqlens, device)
        ends = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
        with varlen.packed_call(config):
            return run(inputs[None], position_ids=sent(positions, device)[None], **ends)[0]
    if layout == "packed":
        return run(inputs[None], position_ids=sent(positions, device)[None])[0]
    if layout != "padded":
        raise ValueError(f"packed_hidden: layout must be 'auto', 'packed' or 'padded', got {layout!r}")
    rows = torch.arange(lengths.numel(), device=starts.device).repeat_interleave(lengths, output_size=count)
    slots = sent(rows * longest + positions, device)
    # The fill (id 0, or zeros) is never attended to by anything that is kept.
    padded = inputs.new_zeros(lengths.numel() * longest, *inputs.shape[1:]).index_copy(0, slots, inputs)
    return run(padded.unflatten(0, (-1, longest))).flatten(0, 1).index_select(0, slots)


def pads(config: Any) -> bool:
    """Whether a packed batch is padded for a model with this config, by how it attends."""
    name = str(config._attn_implementation)
    return "flash" not in name and name != varlen.NAME


def any_pads(*owners: Any) -> bool:
    """Whether one of these transformers models, or of what holds one as a part or as `module`, pads packed batches."""
    return any((m := varlen.inner_model(owner)) is not None and pads(m.config) for owner in owners)


def _lengths_of(inputs: Tensor, cu_seqlens: Tensor) -> Tensor:
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
