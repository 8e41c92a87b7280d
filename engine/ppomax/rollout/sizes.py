"""What a rollout will take, told before it starts: slots, pages, bytes, and by which attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ppomax.models import embedding_weight, head_of, window_of
from ppomax.rollout.arena import cache_shape, pages_for
from ppomax.rollout.attention import check_model, choose, page_of
from ppomax.rollout.gpu_trunk import joined, joined_bytes
from ppomax.rollout.packed_weights import packed_bytes
from ppomax.rollout.sampling import Sampling
from ppomax.rollout.slots import Prompt, need_of, pages_wanted, prefill_tokens

MIB = 2**20
TEMPORARIES = 2.4
"""Measured on a CPU: what a forward's temporaries and the blocks that the allocator keeps add to its activations.
glibc's allocator keeps more or less from one process to the next (0.9 to 4.9 seen), least with a fixed
MALLOC_MMAP_THRESHOLD_; this is near the middle."""


class RolloutError(ValueError):
    """A rollout that cannot be done as asked; raised before a token is made."""


@dataclass(frozen=True)
class RolloutSizes:
    """A rollout's sizes."""

    slots: int
    attention: str
    page: int
    pages: int
    arena_bytes: int
    """Keys and values."""
    workspace_bytes: int
    """Activations of the widest forward, and one step's logits."""
    packed_bytes: int
    """Weights packed or joined for the phase."""
    trunk_bytes: int
    """Recorded states, if asked for: what is returned, and the rows of living sequences."""
    kept_bytes: int = 0
    """Recorded sets of a cut: what is returned, and the rows of living sequences."""
    graph_bytes: int = 0
    """Of decoding from CUDA graphs: their buffers, and a pool for the activations of their widest forward. The driver's
    own record of the graphs is not counted."""

    @property
    def peak_bytes(self) -> int:
        """All of it: what the rollout adds to the process at most."""
        held = self.arena_bytes + self.workspace_bytes + self.packed_bytes
        return held + self.trunk_bytes + self.kept_bytes + self.graph_bytes

    def sentence(self) -> str:
        return (
            f"rollout: {self.slots} slots, {self.pages} pages of {self.page} tokens, attention {self.attention}; "
            f"peak {self.peak_bytes / MIB:.1f} MiB (cache {self.arena_bytes / MIB:.1f}, workspace "
            f"{self.workspace_bytes / MIB:.1f}, packed weights {self.packed_bytes / MIB:.1f}"
            + (f", trunk states {self.trunk_bytes / MIB:.1f}" if self.trunk_bytes else "")
            + (f", sets of the cut {self.kept_bytes / MIB:.1f}" if self.kept_bytes else "")
            + (f", CUDA graphs {self.graph_bytes / MIB:.1f})" if self.graph_bytes else ")")
        )


def rollout_sizes(
    model: PreTrainedModel, prompts: Sequence[Prompt], sampling: Sampling, *, trunk: bool = False
) -> RolloutSizes:
    """The sizes for these distinct prompts; `trunk`: states are recorded. RolloutError if a prompt is over the model's
    window or the arena cannot hold one sequence; UnsupportedModel if the model cannot take an arena."""
    check_model(model)
    attention = choose(model, sampling.impl)
    max_new_tokens, cache_tokens, graphs = sampling.max_new_tokens, sampling.cache_tokens, bool(sampling.cuda_graphs)
    page, config = page_of(attention), model.config.get_text_config()
    longest = max(len(p.tokens) for p in prompts)
    if longest + max_new_tokens > window_of(model.config):
        raise RolloutError(
            f"rollout: a prompt of {longest} tokens with rollout.max_new_tokens={max_new_tokens} is over the model's "
            f"window of {window_of(model.config)}; shorten it or lower rollout.max_new_tokens"
        )
    sequences = sum(len(p.sequences) for p in prompts)
    slots = min(sampling.slots, sequences)
    least = max(n.own + n.prompt for n in (need_of(p, max_new_tokens, page) for p in prompts))
    pages = arena_pages(prompts, slots, max_new_tokens, cache_tokens, page)
    if pages < least:
        raise RolloutError(
            f"rollout: a cache of rollout.cache_tokens={cache_tokens} tokens cannot hold one sequence of {longest} "
            f"prompt tokens and rollout.max_new_tokens={max_new_tokens}, which takes {least} pages of {page}; raise "
            f"rollout.cache_tokens to {least * page} or more, or lower rollout.max_new_tokens"
        )
    tokens = sum(len(p.tokens) * (len(p.sequences) + 1) for p in prompts) + (sequences + slots) * (max_new_tokens - 1)
    width = embedding_weight(model).shape[1]
    row, vocabulary = width * model.dtype.itemsize, len(head_of(model).weight)
    capacity = pages_for(longest + max_new_tokens - 1, page) * page
    gathered = _gathered(model, slots, capacity) if attention == "sdpa" else 0
    return RolloutSizes(
        slots=slots,
        attention=attention,
        page=page,
        pages=pages,
        arena_bytes=arena_bytes(config, pages + graphs, page, model.dtype),
        workspace_bytes=_workspace(model, prompts, slots) + gathered + _repetition(model, slots, sampling),
        packed_bytes=joined_bytes(joined(model)) if attention == "triton" else packed_bytes(model, attention),
        trunk_bytes=tokens * row if trunk else 0,
        kept_bytes=(sequences + slots) * max_new_tokens * sampling.cut.row_bytes(vocabulary) if sampling.cut else 0,
        graph_bytes=_graphs(slots) + _activations(model, slots) + gathered if graphs else 0,
    )


def arena_pages(prompts: Sequence[Prompt], slots: int, max_new_tokens: int, cache_tokens: int | None, page: int) -> int:
    """Pages of the KV arena: what `slots` of these sequences need, or fewer where `cache_tokens` is less."""
    pages = pages_wanted(prompts, slots, max_new_tokens, page)
    return pages if cache_tokens is None else min(pages, cache_tokens // page)


def arena_bytes(config: PreTrainedConfig, pages: int, page: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values in so many pages, over all layers."""
    return pages * page * cache_shape(config).token_bytes(dtype)


def _workspace(model: PreTrainedModel, prompts: Sequence[Prompt], slots: int) -> int:
    """Bytes of the widest forward's live activations and of a step's logits."""
    whole = sum(len(p.tokens) for p in prompts)
    tokens = slots + min(whole, max(prefill_tokens(model.device.type), *(len(p.tokens) for p in prompts)))
    head = head_of(model)
    copies = 1 + (head.scale != 1.0) + 2 * (head.softcap is not None)
    return _activations(model, tokens) + copies * slots * head.weight.shape[0] * model.dtype.itemsize


def _activations(model: PreTrainedModel, tokens: int) -> int:
    """Bytes that a forward of the trunk holds at once."""
    config, shape = model.config.get_text_config(), cache_shape(model.config)
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    heads = config.num_attention_heads * shape.head_dim
    attention = 3 * heads + 3 * shape.kv_heads * shape.head_dim
    return round(TEMPORARIES * tokens * (3 * width + max(attention, 3 * inner)) * model.dtype.itemsize)


def _repetition(model: PreTrainedModel, slots: int, sampling: Sampling) -> int:
    """Bytes of the tokens drawn so far, and of a step's logits while those tokens are made less likely."""
    if sampling.repetition_penalty == 1:
        return 0
    vocabulary = head_of(model).weight.shape[0]
    return slots * (8 * sampling.max_new_tokens + vocabulary * (3 * model.dtype.itemsize + 2))


def _gathered(model: PreTrainedModel, slots: int, capacity: int) -> int:
    """Bytes of one layer's pages as `sdpa` gathers them: keys, values, and one of the two once more on the way."""
    shape = cache_shape(model.config)
    return 3 * slots * capacity * shape.kv_heads * shape.head_dim * model.dtype.itemsize


def _graphs(slots: int) -> int:
    """Bytes of the buffers of DecodeGraphs: ids, positions, table rows, numbers and counts; tokens and
    logprobs."""
    return slots * (5 * 8 + 8 + 4)
