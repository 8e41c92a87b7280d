"""What a test puts in the place of a device's parts: a capture that records what a CUDA graph would, and a module with
flash-attn's functions in plain torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from ppomax.rollout import sizes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DECODE = importlib.import_module("ppomax.rollout.decode")
"""The module; the package gives its function by that name."""
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
"""Ops that on a device wait for it."""


class Tape(TorchDispatchMode):
    """The tensor operations of one run, which `replay` repeats on the same memory. As in a CUDA graph, what Python did
    in between is not repeated, an operation that reads the device or copies an array from the host is an error, and
    nothing is there after the capture that a replay does not compute."""

    def __init__(self, run: Callable[[], None]):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        with self:
            run()
        for out in self._fresh():
            if out.is_floating_point():
                out.fill_(torch.nan)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        host_array = func is torch.ops.aten.lift_fresh.default and args[0].ndim > 0
        if func in WAITS or host_array:
            raise RuntimeError(f"{func} cannot be captured")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            if _is_view(func):
                continue
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for there, now in zip(_tensors(out), _tensors(again), strict=True):
                    there.copy_(now)

    def _fresh(self) -> list[Tensor]:
        """What was made on the way, as against what was there before or is a view."""
        made = [out for func, _, _, out in self.calls if not _is_view(func) and not func._schema.is_mutable]
        return [x for out in made for x in _tensors(out)]


def _is_view(func: Any) -> bool:
    return not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def captures_by_tape(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """From here on, `cuda_graphs=True` on a CPU captures on tapes, with the model attending by `sdpa`; gives the tapes
    that were made."""
    tapes: list[Tape] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        run()  # the warm-up
        tapes.append(Tape(run))
        return tapes[-1].replay

    monkeypatch.setattr(DECODE, "capture_for", lambda device: capture)
    attend_by(monkeypatch, "sdpa")
    return tapes


def attend_by(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From here on, rollouts on a CPU attend by this implementation."""
    monkeypatch.setattr(sizes, "choose", lambda model, impl="auto": name)


class FakeFlash(ModuleType):
    """flash-attn's two functions that a rollout calls, by its documented signatures: keys in blocks of 256 named by
    block_table, lengths in cache_seqlens; causal and windowed masks aligned to the last key."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.calls: list[str] = []

    def flash_attn_with_kvcache(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
        rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: Tensor | None = None,
        cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
        softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """q (B, T, H, D), caches (blocks, 256, G, D)."""
        self.calls.append("decode")
        assert cache_seqlens is not None
        assert block_table is not None
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        assert k_cache.shape[1] % 256 == 0
        assert k is None, "the caller writes the cache"
        assert cache_seqlens.shape == (len(q),)
        assert len(block_table) == len(q)
        keys, values = (x[block_table.long()].flatten(1, 2) for x in (k_cache, v_cache))
        return _attend(q, keys, values, cache_seqlens, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q (N, H, D), k and v (M, G, D)."""
        self.calls.append("prompts")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (sum(queries), sum(keys)) == (len(q), len(k))
        assert (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k)
        rows = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        how = (softmax_scale, causal, window_size, softcap)
        return torch.cat([_attend(a[None], b[None], c[None], torch.tensor([len(b)]), *how)[0] for a, b, c in rows])


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float | None, causal: bool,
    window: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    """(B, T, H, D) over the first lengths (B,) of (B, L, G, D)."""
    repeat = q.shape[2] // keys.shape[2]
    keys, values = (x.repeat_interleave(repeat, 2).double() for x in (keys, values))
    scores = torch.einsum("bthd,blhd->bhtl", q.double(), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(keys.shape[1])
    own = lengths[:, None, None] - q.shape[1] + torch.arange(q.shape[1])[:, None]
    seen = at < lengths[:, None, None]
    if causal:
        seen = seen & (at <= own)
    if window[0] >= 0:
        seen = seen & (at >= own - window[0])
    if window[1] >= 0:
        seen = seen & (at <= own + window[1])
    weights = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), -1)
    return torch.einsum("bhtl,blhd->bthd", weights, values).to(q.dtype)


def attend_by_flash(monkeypatch: pytest.MonkeyPatch) -> FakeFlash:
    """From here on, rollouts on a CPU attend by `flash`, with this in flash-attn's place."""
    fake = FakeFlash()
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    attend_by(monkeypatch, "flash")
    return fake
