# mypy: allow-untyped-defs
"""Rewards of PPO on text: r_t = -kl_coef * KL_t + [t is the last token of s] * score_s.
One launch over tokens: reads 8 B a token in fp32, writes 4 B. Each token looks up, by bisection of cu_seqlens (a few
hundred bytes, in L1), whether a sequence ends after it; so every token is written once, by one lane, whatever the
lengths, and no second launch adds the scores. Wrong cu_seqlens only misplace scores: they are no
addresses."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends.launch_triton import Case, floats, integers, launch
from .kl_penalty_triton import KINDS, kl_term

BLOCK = 1024
WARPS = 4


@triton.jit(do_not_specialize=["N", "S", "steps"], do_not_specialize_on_alignment=["cu_seqlens_ptr", "scores_ptr"])
def _token_rewards_kernel(
    logprobs_ptr, ref_logprobs_ptr, scores_ptr, cu_seqlens_ptr, rewards_ptr, N, S, steps, kl_coef,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    logprobs = tl.load(logprobs_ptr + at, mask=inside, other=0.0).to(tl.float32)
    ref_logprobs = tl.load(ref_logprobs_ptr + at, mask=inside, other=0.0).to(tl.float32)
    reward = -kl_coef * kl_term(logprobs - ref_logprobs, ESTIMATOR)
    low = tl.zeros((BLOCK,), tl.int32)  # the first sequence s with cu_seqlens[s + 1] > at lies in [low, high)
    high = low + S
    for _ in range(steps):
        middle = (low + high) // 2
        past = tl.load(cu_seqlens_ptr + middle + 1, mask=middle < S, other=0) > at
        high = tl.where(past, middle, high)
        low = tl.where(past | (low >= high), low, middle + 1)
    sequence = tl.minimum(low, S - 1)
    last = inside & (tl.load(cu_seqlens_ptr + sequence + 1, mask=inside, other=0) == at + 1)
    score = tl.load(scores_ptr + sequence, mask=last, other=0.0).to(tl.float32)
    tl.store(rewards_ptr + at, reward + score, mask=inside)


def token_rewards_triton(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, kl_coef: float, estimator: str
) -> Tensor:
    rewards = logprobs.new_empty(logprobs.shape, dtype=torch.float32)
    n, sequences = rewards.numel(), scores.shape[0]
    if n:
        launch(
            _token_rewards_kernel, (triton.cdiv(n, BLOCK),), logprobs, ref_logprobs, scores, cu_seqlens, rewards, n,
            sequences, sequences.bit_length(), kl_coef, ESTIMATOR=estimator, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return rewards


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    cu, score = integers(9, dtype=torch.int32), floats(8)
    for dtype, est in KINDS:
        z = floats(4096, dtype=dtype)
        yield f"{str(dtype)[6:]} {est}", partial(token_rewards_triton, score, z, z, cu, 0.1, est)
