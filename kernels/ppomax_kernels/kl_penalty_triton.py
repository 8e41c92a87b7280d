# mypy: allow-untyped-defs
"""Per-token KL estimates, and their gradient. With u = logprob - ref_logprob:
k1 = u ; k2 = u^2/2 ; k3 = e^-u - 1 + u, u clamped to +-20 ; abs = |u|.
dk/du = 1 ; u ; 1 - e^-u, 0 outside +-20 ; sign u.
One launch each way; reads 8 B a token in fp32, writes 4 B (backward: 12 B and 4 B), so bound by the launch at the sizes
of a batch of responses. k3 goes by a series near u = 0, where most tokens lie and e^-u - 1 + u would cancel.
Left out on purpose: the gradient for ref_logprobs, which is this one negated."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends.launch_triton import Case, floats, launch
from .backends.math_triton import LOG_RATIO_LIMIT, clamp, exp_minus_1_minus_x, expm1

BLOCK = 1024
WARPS = 4


@triton.jit
def kl_term(u, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == "k1":
        return u
    elif ESTIMATOR == "k2":
        return 0.5 * u * u
    elif ESTIMATOR == "abs":
        return tl.abs(u)
    else:
        return exp_minus_1_minus_x(-clamp(u, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


@triton.jit
def kl_slope(u, ESTIMATOR: tl.constexpr):
    """d kl_term / du."""
    if ESTIMATOR == "k1":
        return u * 0.0 + 1.0
    elif ESTIMATOR == "k2":
        return u
    elif ESTIMATOR == "abs":
        return tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u))
    else:
        return tl.where(tl.abs(u) > LOG_RATIO_LIMIT, 0.0, -expm1(-u))


@triton.jit(do_not_specialize=["N"])
def _kl_penalty_kernel(logprobs_ptr, ref_logprobs_ptr, kl_ptr, N, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    logprobs = tl.load(logprobs_ptr + at, mask=inside, other=0.0).to(tl.float32)
    ref_logprobs = tl.load(ref_logprobs_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(kl_ptr + at, kl_term(logprobs - ref_logprobs, ESTIMATOR), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _kl_penalty_backward_kernel(
    dkl_ptr, logprobs_ptr, ref_logprobs_ptr, dlogprobs_ptr, N, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    logprobs = tl.load(logprobs_ptr + at, mask=inside, other=0.0).to(tl.float32)
    ref_logprobs = tl.load(ref_logprobs_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dkl = tl.load(dkl_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dlogprobs_ptr + at, dkl * kl_slope(logprobs - ref_logprobs, ESTIMATOR), mask=inside)


def kl_penalty_triton(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    kl = logprobs.new_empty(logprobs.shape, dtype=torch.float32)
    n = kl.numel()
    if n:
        launch(
            _kl_penalty_kernel, (triton.cdiv(n, BLOCK),), logprobs, ref_logprobs, kl, n,
            ESTIMATOR=estimator, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return kl


def kl_penalty_backward_triton(dkl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    dlogprobs = logprobs.new_empty(logprobs.shape, dtype=torch.float32)
    n = dlogprobs.numel()
    if n:
        launch(
            _kl_penalty_backward_kernel, (triton.cdiv(n, BLOCK),), dkl, logprobs, ref_logprobs, dlogprobs, n,
            ESTIMATOR=estimator, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return dlogprobs


KINDS = ((torch.float32, "k1"), (torch.float32, "k2"), (torch.float32, "abs"), (torch.bfloat16, "k3"))


def cases() -> Iterator[Case]:
    """For ahead-of-time compilation."""
    x = floats(4096)
    for dtype, est in KINDS:
        name, z = f"{str(dtype)[6:]} {est}", floats(4096, dtype=dtype)
        yield name, partial(kl_penalty_triton, z, z, est)
        yield name, partial(kl_penalty_backward_triton, x, z, z, est)
