"""Attention of a rollout by kernels that are not ours: torch's scaled_dot_product_attention, and flash-attn 2.

Each comes in two parts, since a forward carries two kinds of rows: decoding rows, one query each, read the pages of
their sequence in one batch; the rows of a prompt attend to the fresh keys of that prompt, which they came with. The
decoding part takes nothing from the host but sizes, so that it can be captured in a CUDA graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from ppomax_kernels.backends import reference
from torch import Tensor, nn

from ppomax.rollout.arena import FLASH_PAGE, Step


class AttentionTerms(NamedTuple):
    """What a layer asks of its attention: `softmax(cap(scale * q @ k))` over the last `window` keys. 0: no window, no
    cap."""

    scale: float
    window: int
    softcap: float


def attend_borrowed(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: tuple[Tensor, Tensor],
    step: Step,
    terms: AttentionTerms,
) -> Tensor:
    """`name` flash or sdpa: query (N, H, D), key and value (N, G, D) of the step's tokens -> (N, H, D); their keys and
    values are written into `pages` first."""
    flash, n, parts = name == "flash", step.decoding, []
    (_write_flash if flash else _write_sdpa)(key, value, pages, step)
    if n:
        parts.append((_decode_flash if flash else _decode_sdpa)(query[:n], pages, step, terms))
    if step.prompts:
        parts.append((_prompts_flash if flash else _prompts_sdpa)(query[n:], key[n:], value[n:], step, terms))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# ---- torch's: pages as ppomax_kernels.internal.paged_attention has them ---------------------------------------------


def _write_sdpa(key: Tensor, value: Tensor, pages: tuple[Tensor, Tensor], step: Step) -> None:
    reference.write_pages(key, value, *pages, step.tables, step.slots, step.positions)


def _decode_sdpa(query: Tensor, pages: tuple[Tensor, Tensor], step: Step, terms: AttentionTerms) -> Tensor:
    n, blocks = len(query), -(-step.longest // pages[0].shape[-1])
    keys, values = reference.read_pages(*pages, step.tables[step.slots[:n].long(), :blocks])
    at, own = torch.arange(keys.shape[2], device=query.device), step.positions[:n, None]
    return _sdpa(query[:, :, None], keys, values, _seen(at, own, terms.window)[:, None, None], terms)[:, :, 0]


def _prompts_sdpa(query: Tensor, key: Tensor, value: Tensor, step: Step, terms: AttentionTerms) -> Tensor:
    parts = []
    for mine in zip(*(x.split(step.prompts) for x in (query, key, value)), strict=True):
        at = torch.arange(len(mine[0]), device=query.device)
        q, k, v = (x.transpose(0, 1)[None] for x in mine)
        parts.append(_sdpa(q, k, v, _seen(at, at[:, None], terms.window), terms)[0].transpose(0, 1))
    return torch.cat(parts)


def _seen(at: Tensor, own: Tensor, window: int) -> Tensor:
    """Which of the positions `at` a query at position `own` attends to."""
    return (at <= own) & (at > own - window) if window else at <= own


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, terms: AttentionTerms) -> Tensor:
    """(B, H, T, D) over (B, G, L, D); torch's fused attention has no cap, so a capped one is spelt out."""
    if not terms.softcap:
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=terms.scale, enable_gqa=True
        )
    repeat = query.shape[1] // keys.shape[1]
    scores = terms.scale * query @ keys.repeat_interleave(repeat, 1).transpose(-1, -2)
    scores = terms.softcap * torch.tanh(scores / terms.softcap)
    weights = torch.softmax(scores.float().masked_fill(~seen, -torch.inf), -1).to(values.dtype)
    return weights @ values.repeat_interleave(repeat, 1)


# ---- flash-attn 2: pages (pages, FLASH_PAGE, G, D). Not run on a device yet -----------------------------------------


def _write_flash(key: Tensor, value: Tensor, pages: tuple[Tensor, Tensor], step: Step) -> None:
    slots, at = step.slots.long(), step.positions.long()
    rows = step.tables[slots, at // FLASH_PAGE].long() * FLASH_PAGE + at % FLASH_PAGE
    pages[0].flatten(0, 1)[rows] = key
    pages[1].flatten(0, 1)[rows] = value


def _decode_flash(query: Tensor, pages: tuple[Tensor, Tensor], step: Step, terms: AttentionTerms) -> Tensor:
    """Lengths are read on the device; the width of the table bounds them for the host's choice of a launch."""
    from flash_attn import flash_attn_with_kvcache

    n, blocks = len(query), -(-step.longest // FLASH_PAGE)
    return flash_attn_with_kvcache(  # type: ignore[no-any-return]
        query[:, None], *pages, cache_seqlens=step.positions[:n] + 1,
        block_table=step.tables[step.slots[:n].long(), :blocks], **_flash_options(terms),
    )[:, 0]  # fmt: skip


def _prompts_flash(query: Tensor, key: Tensor, value: Tensor, step: Step, terms: AttentionTerms) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    ends, longest = step.prompt_ends, max(step.prompts)
    return flash_attn_varlen_func(  # type: ignore[no-any-return]
        query, key, value, ends, ends, longest, longest, **_flash_options(terms)
    )


def _flash_options(terms: AttentionTerms) -> dict[str, object]:
    window = (terms.window - 1, 0) if terms.window else (-1, -1)  # keys to the left of its own, and to the right
    return {"softmax_scale": terms.scale, "causal": True, "window_size": window, "softcap": terms.softcap}
