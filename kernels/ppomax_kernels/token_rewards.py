"""Rewards of PPO on text: a KL penalty at each token, the sequence's score at its last token.
r_t = -kl_coef * KL_t + [t is the last token of s] * score_s. One pass, one launch: reads 8 B a token, writes 4 B.
The score is added as it comes: normalise and clip it before, so that the penalty stays outside the clip (arXiv
2307.04964, section 5.4)."""

from torch import Tensor, float32

from . import checks, raw
from .backends import native, reference
from .dispatch import Table, late, pick
from .kl_penalty import ESTIMATORS
from .library import primitive

FORWARD: Table = {
    "cpu": native.token_rewards_cpu,
    "triton": late("token_rewards_triton", "token_rewards_triton"),
    "ref": reference.token_rewards,
}


def _forward(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    cu_seqlens: Tensor,
    kl_coef: float,
    estimator: str,
    impl: str,
) -> Tensor:
    op = "token_rewards"
    raw.place(op, impl, logprobs, scores, ref_logprobs, cu_seqlens)
    raw.alike(op, logprobs, ref_logprobs)
    raw.each(op, raw.sequences(op, cu_seqlens), scores)
    raw.each(op, logprobs.numel(), logprobs)
    return FORWARD[impl](scores, logprobs, ref_logprobs, cu_seqlens, kl_coef, estimator)  # type: ignore[no-any-return]


def _shapes(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    cu_seqlens: Tensor,
    kl_coef: float,
    estimator: str,
    impl: str,
) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=float32)


token_rewards_op = primitive("token_rewards", _forward, _shapes, "Tensor")


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    impl: str = "auto",
) -> Tensor:
    """`-kl_coef * kl_penalty(logprobs, ref_logprobs)`, plus `scores[s]` at the last token of each sequence s.

    scores: (S,); logprobs, ref_logprobs: (N,) packed; all float32, bfloat16 or float16, contiguous. cu_seqlens:
    (S+1,) int32, from 0 to N, strictly
    increasing. kl_coef: >= 0, in reward per nat. Returns rewards (N,) float32. Not differentiable: an input that
    requires a gradient is refused while gradients are on.
    Raises TypeError for dtypes, ValueError for the rest; on a GPU the values of cu_seqlens are not read back, and
    wrong ones never read or write outside the tensors.
    """
    op = "token_rewards"
    checks.tensor(op, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, cu_seqlens=cu_seqlens)
    checks.same_device(op, "logprobs", logprobs, scores=scores, ref_logprobs=ref_logprobs, cu_seqlens=cu_seqlens)
    checks.floating(op, impl, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs)
    if logprobs.ndim != 1:
        raise ValueError(
            f"{op}: logprobs must be packed, of shape (N,), got {tuple(logprobs.shape)}; pack the response tokens of "
            "all sequences"
        )
    checks.same_shape(op, "logprobs", logprobs.shape, ref_logprobs=ref_logprobs)
    sequences = checks.cu_seqlens(op, cu_seqlens)
    if tuple(scores.shape) != (sequences,):
        raise ValueError(
            f"{op}: scores must have shape (S,) = ({sequences},) as cu_seqlens says, got {tuple(scores.shape)}; one "
            "score a sequence"
        )
    checks.contiguous(op, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs)
    checks.number(op, "kl_coef", kl_coef, 0.0, float("inf"))
    checks.one_of(op, "estimator", estimator, ESTIMATORS)
    checks.no_gradient(op, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs)
    name = pick(op, impl, logprobs.device, FORWARD)
    if name == "ref":
        return reference.token_rewards(scores, logprobs, ref_logprobs, cu_seqlens, kl_coef, estimator)
    return token_rewards_op(scores, logprobs, ref_logprobs, cu_seqlens, kl_coef, estimator, name)  # type: ignore[no-any-return]
