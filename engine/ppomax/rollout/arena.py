"""The KV arena of a rollout: pages of keys and values, allocated once for the phase and given back with it.

One pair of tensors a layer; a page holds the same positions in every layer, so one table of page numbers serves all. A
sequence owns the pages of its own tokens; the full pages of a prompt that several sequences continue are one and the
same for all of them. Where the tokens of a forward stand is `Step`; the arithmetic is in attention.py. To transformers
the arena is a `Cache` whose `update` hands keys and values on to the attention function, which writes them.
Sliding-window layers keep all positions and read the window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from ppomax_kernels.internal.paged_attention import PAGE, empty_pages
from ppomax_kernels.internal.paged_decode import empty_row_pages
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ppomax.models.transfers import upload

ROW_PAGE = 32
"""Tokens of a page on a GPU, where keys lie in rows: on an H200 pages of 64 are read as fast and waste twice as much,
those of 16 are read up to 8 % slower."""


@dataclass(frozen=True)
class CacheShape:
    """What one token keeps in the cache."""

    layers: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


def cache_shape(config: PreTrainedConfig) -> CacheShape:
    """Layers, key heads and head width, as a HF config tells them."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return CacheShape(text.num_hidden_layers, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads)


def pages_for(tokens: int, page: int = PAGE) -> int:
    """Pages that hold so many tokens: `ceil(tokens / page)`."""
    return -(-tokens // page)


@dataclass(frozen=True)
class Step:
    """Where the tokens of one forward stand: first one token of each living sequence, then whole prompts."""

    tables: Tensor
    """(slots, blocks) int32: the pages of each slot's sequence."""
    slots: Tensor
    """(N,) int32: the row of `tables` that each token belongs to."""
    positions: Tensor
    """(N,) int32."""
    decoding: int
    """How many of the tokens are next tokens of living sequences."""
    longest: int
    """Highest position of those, plus 1; or more, if as many positions have a page in the tables."""
    prompts: list[int]
    """Lengths of the prompts after them."""

    @cached_property
    def prompt_ends(self) -> Tensor:
        """(len(prompts) + 1,) int32: where each prompt starts among the rows of prompts, and where the last ends."""
        return upload(list(accumulate([0, *self.prompts])), self.positions.device, torch.int32)


class ArenaLayer(CacheLayerMixin):
    """The pages of one layer."""

    is_sliding = False

    def __init__(self, pages: int, page: int, shape: CacheShape, dtype: torch.dtype, device: torch.device):
        super().__init__()
        if page == ROW_PAGE:
            self.keys, self.values = empty_row_pages(pages, shape.kv_heads, page, shape.head_dim, dtype, device)
        else:
            self.keys, self.values = empty_pages(pages, shape.kv_heads, shape.head_dim, shape.head_dim, dtype, device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pages are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new states themselves; the attention function writes them into the pages."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class Arena(Cache):
    """`pages` pages of `page` tokens in every layer, and which of them are free; `scratch`: one page more, which is
    never given out, for the rows that fill up a bucket (graphs.py)."""

    def __init__(
        self,
        config: PreTrainedConfig,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
        page: int = PAGE,
        scratch: bool = False,
    ):
        self.shape, self.pages, self.page = cache_shape(config), pages, page
        self.scratch = pages if scratch else None
        stored = pages + scratch
        super().__init__(layers=[ArenaLayer(stored, page, self.shape, dtype, device) for _ in range(self.shape.layers)])
        self.stores: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in self.layers]  # type: ignore
        """Key and value pages of each layer."""
        self.free = list(range(pages - 1, -1, -1))
        self.least_free = pages
        self.waiting: int | None = None
        """Layer whose keys came by `update` and were not attended to yet."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.waiting = layer_idx
        return key_states, value_states

    def take(self, count: int) -> list[int]:
        """Pages off the free list."""
        taken = [self.free.pop() for _ in range(count)]
        self.least_free = min(self.least_free, len(self.free))
        return taken

    def give_back(self, pages: list[int]) -> None:
        self.free.extend(reversed(pages))

    def copy_pages(self, source: list[int], target: list[int]) -> None:
        """The contents of pages into others, in every layer."""
        if not source:
            return
        index = upload([source, target], self.stores[0][0].device)
        for store in self.stores:
            for pages in store:
                pages[index[1]] = pages[index[0]]
