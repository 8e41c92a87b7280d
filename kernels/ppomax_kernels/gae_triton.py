# mypy: allow-untyped-defs
"""GAE as a parallel scan: one program a sequence, one launch for all, walked in blocks from each sequence's end.
delta_t = r_t + gamma*V_next - V_t ;  A_t = delta_t + gamma*lam*A_next ;  R_t = A_t + V_t ;
after the end V_next is bootstrap (or 0) and A_next 0.

A step is the affine map A -> a*A + b with (a, b) = (gamma*lam, delta), or (1, 0) where the mask is off; maps compose
associatively, so a block of 2048 steps takes about log2(2048) dependent steps instead of 2048. The advantage at the
block's far end is carried to the next block. V_next of a masked sequence is the value of the next kept step: a second
scan, "the last one seen", over the values one step later.
Reads r, V (mask) once, writes A, R once: 16 B a token in fp32; the second read of V and mask, one step later, comes
from L1. Small tensors, so what counts is latency: one launch, and blocks as large as registers allow (8 steps a thread,
some 90 registers; 512 threads of as many steps spilled). The block is fixed, so a sequence's bits do not depend on the
other sequences. A masked row is walked from its last step that counts, found by one more read of the mask, so that its
padding changes no bit either. Ends from cu_seqlens are cut to [0, N] before use.
Left out on purpose: several programs a sequence (look-back between them), which only one very long sequence would gain
from."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends.launch_triton import Case, floats, integers, launch, mask_bytes

BLOCK = 2048
WARPS = 8
INTERPRETED_BLOCK = 128  # the interpreter walks a scan lane by lane in Python


@triton.jit
def _then(a1, b1, a2, b2):
    """The map (a1, b1) followed by (a2, b2)."""
    return a1 * a2, tl.fma(a2, b1, b2)


@triton.jit
def _last_seen(seen1, v1, seen2, v2):
    return seen1 | seen2, tl.where(seen2 != 0, v2, v1)


@triton.jit
def _at_end(x, lanes, BLOCK: tl.constexpr):
    """The last lane's entry."""
    return tl.sum(tl.where(lanes == BLOCK - 1, x, 0.0), 0)


@triton.jit
def _kept(mask_ptr, at, inside):
    """1 where a step counts, as int32."""
    if mask_ptr is not None:
        inside = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    return inside.to(tl.int32)


@triton.jit(
    do_not_specialize=["N", "rewards_stride", "values_stride", "mask_stride"],
    do_not_specialize_on_alignment=[
        "rewards_ptr", "values_ptr", "mask_ptr", "cu_seqlens_ptr", "lams_ptr", "bootstrap_ptr",
    ],
)  # fmt: skip
def _gae_kernel(
    rewards_ptr, values_ptr, mask_ptr, cu_seqlens_ptr, lams_ptr, bootstrap_ptr, advantages_ptr, returns_ptr, N,
    rewards_stride, values_stride, mask_stride, gamma, step, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is not None:  # packed: N tokens in all, one row
        first = tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), N).to(tl.int64)
    else:  # padded: N tokens in each row
        first = tl.zeros((), tl.int64)
        end = first + N
        rewards_ptr += sequence * rewards_stride
        values_ptr += sequence * values_stride
        if mask_ptr is not None:
            mask_ptr += sequence * mask_stride
        advantages_ptr += sequence * N
        returns_ptr += sequence * N
    if lams_ptr is not None:
        step = gamma * tl.load(lams_ptr + sequence).to(tl.float32)
    advantage = tl.zeros((), tl.float32)
    value = tl.zeros((), tl.float32)
    if bootstrap_ptr is not None:
        value = tl.load(bootstrap_ptr + sequence).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    if mask_ptr is not None:  # the walk starts at the last step that counts: a row's padding moves no lane
        last = first
        for start in range(first, end, BLOCK):
            at = start + lanes
            last = tl.maximum(last, tl.max(tl.where(_kept(mask_ptr, at, at < end) != 0, at + 1, first), 0))
        for start in range(last, end, BLOCK):
            at = start + lanes
            tl.store(advantages_ptr + at, tl.zeros((BLOCK,), tl.float32), mask=at < end)
            tl.store(returns_ptr + at, tl.zeros((BLOCK,), tl.float32), mask=at < end)
        end = last
    for walked in range(0, end - first, BLOCK):
        at = end - 1 - walked - lanes  # time runs backwards along the lanes
        inside = at >= first
        keep = _kept(mask_ptr, at, inside)
        r = tl.load(rewards_ptr + at, mask=keep != 0, other=0.0).to(tl.float32)
        v = tl.load(values_ptr + at, mask=keep != 0, other=0.0).to(tl.float32)
        after = inside & (at + 1 < end)
        seen = _kept(mask_ptr, at + 1, after)
        next_value = tl.load(values_ptr + at + 1, mask=seen != 0, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            seen, next_value = tl.associative_scan((seen, next_value), 0, _last_seen)
        next_value = tl.where(seen != 0, next_value, value)
        a = tl.where(keep != 0, step, 1.0)
        b = tl.where(keep != 0, tl.fma(gamma, next_value, r) - v, 0.0)
        a, b = tl.associative_scan((a, b), 0, _then)
        result = tl.fma(a, advantage, b)
        tl.store(advantages_ptr + at, tl.where(keep != 0, result, 0.0), mask=inside)
        tl.store(returns_ptr + at, tl.where(keep != 0, result + v, 0.0), mask=inside)
        advantage = _at_end(result, lanes, BLOCK)
        if mask_ptr is not None:
            value = _at_end(next_value, lanes, BLOCK)


def gae_triton(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    lams: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    advantages = rewards.new_empty(rewards.shape, dtype=torch.float32)
    returns = torch.empty_like(advantages)
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rewards.numel() and sequences:
        strides = [x.stride(0) if x is not None and cu_seqlens is None else 0 for x in (rewards, values, mask)]
        block = INTERPRETED_BLOCK if rewards.device.type == "cpu" else BLOCK
        launch(
            _gae_kernel, (sequences,), rewards, values, mask_bytes(mask), cu_seqlens, lams, bootstrap, advantages,
            returns, rewards.shape[-1], *strides, gamma, gamma * lam, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return advantages, returns


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    mask, cu, score = integers(4096, dtype=torch.bool), integers(9, dtype=torch.int32), floats(8)
    for dtype, m, per in ((torch.float32, None, None), (torch.float32, mask, score), (torch.bfloat16, mask, None)):
        name = f"{str(dtype)[6:]}{' mask' if m is not None else ''}{' lam, bootstrap' if per is not None else ''}"
        z, square = floats(4096, dtype=dtype), floats(8, 512, dtype=dtype)
        yield name + " packed", partial(gae_triton, z, z, cu, m, 1.0, 0.95, per, per)
        m = None if m is None else m.view(8, 512)
        yield name + " padded", partial(gae_triton, square, square, None, m, 1.0, 0.95, per, per)
