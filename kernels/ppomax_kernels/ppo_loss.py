"""Clipped PPO policy loss from log-probabilities, with everything that a run watches, in one pass.
u = clamp(logprob - old, +-20), w = exp(u): max(-A*w, -A*clip(w, 1-clip_low, 1+clip_high)) ; dual clip, for A < 0:
min(that, -A*dual_clip) ; times the importance weight; sum over the mask / normalizer; + kl_coef * KL(ref_logprobs) -
ent_coef * entropy, summed alike. The forward writes each token's gradient too (4 B), so the backward is one scaling.
The clamp of u passes no gradient; at the edges of the clip interval the unclipped branch decides. A masked token is
never read into a result: NaN there is harmless.
Left out on purpose: ratios per sequence, and any host sync."""

from typing import Any

import torch
from torch import Tensor

from . import checks, raw
from .backends import native, reference
from .dispatch import Table, late, pick
from .kl_penalty import ESTIMATORS
from .library import first_derivative, primitive, split
from .metrics import POLICY_METRICS, Metrics
from .terms import Divisor, PolicyTokens, PpoTerms

METRICS = POLICY_METRICS
MAXIMA = ("ratio_max", "ratio_gap")
"""Of those, the ones that are no sums: of parts of a batch, the larger counts."""

FORWARD: Table = {
    "cpu": native.ppo_loss_cpu,
    "triton": late("ppo_loss_triton", "ppo_loss_triton"),
    "ref": reference.ppo_loss,
}


def _forward(
    logprobs: Tensor, tokens: PolicyTokens, entropy: Tensor | None, terms: PpoTerms, need_grad: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw.place("ppo_loss", impl, logprobs, *tokens, entropy, terms.normalizer)
    raw.alike("ppo_loss", logprobs, *tokens, entropy)
    raw.mask("ppo_loss", tokens.mask)
    raw.number("ppo_loss", terms.normalizer)
    return FORWARD[impl](logprobs, tokens, entropy, terms, need_grad)  # type: ignore[no-any-return]


def _shapes(
    logprobs: Tensor, tokens: PolicyTokens, entropy: Tensor | None, terms: PpoTerms, need_grad: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    f32 = torch.float32
    return (
        logprobs.new_empty((), dtype=f32),
        logprobs.new_empty((len(METRICS),), dtype=f32),
        logprobs.new_empty(logprobs.shape if need_grad else (0,), dtype=f32),
        logprobs.new_empty((), dtype=f32),
    )


ppo_loss_fwd = primitive(
    "ppo_loss_fwd", _forward, _shapes, "(Tensor loss, Tensor metrics, Tensor dlogprobs, Tensor scale)"
)


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor | None, impl: str, *flat: Any) -> tuple[Tensor, Tensor]:
        """flat: the fields of PolicyTokens, then those of PpoTerms."""
        tokens, terms = split(flat, PolicyTokens, PpoTerms)
        loss, metrics, dlogprobs, scale = ppo_loss_fwd(logprobs, *tokens, entropy, *terms, True, impl)
        ctx.save_for_backward(dlogprobs, scale, tokens.mask)
        ctx.dtypes = logprobs.dtype, entropy.dtype if entropy is not None else None
        ctx.ent_coef, ctx.inputs = terms.ent_coef, 3 + len(flat)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @first_derivative
    def backward(ctx: Any, dloss: Tensor | None, dmetrics: None) -> tuple[Tensor | None, ...]:
        d, scale, mask = ctx.saved_tensors
        nothing = (None,) * ctx.inputs
        if dloss is None:
            return nothing
        unit = dloss * scale
        dlogprobs = (d * unit).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        dentropy = None
        if ctx.needs_input_grad[1]:
            share = unit * -ctx.ent_coef
            dentropy = (share.expand(d.shape) if mask is None else share * mask).to(ctx.dtypes[1])
        return dlogprobs, dentropy, *nothing[2:]


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    normalizer: float | Tensor | None = None,
    is_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    estimator: str = "k3",
    entropy: Tensor | None = None,
    ent_coef: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Metrics]:
    """`(mask * max(-A*w, -A*w.clamp(1-clip_low, 1+clip_high))).sum() / normalizer` with `w = exp(logprobs -
    old_logprobs)`.

    All tensors have one shape, (N,) or any other, contiguous, float32, bfloat16 or float16 each; mask is bool or uint8.
    clip_low in [0, 1], clip_high >= 0 (1 and inf: no clip). dual_clip > 1: for A < 0 the loss of a token is at most
    -A*dual_clip.
    normalizer: what sums are divided by: the mask's sum by default, or a number > 0, or a 0-d float32 tensor (the
    token count of all micro-batches and ranks, so that results do not depend on the split). Nothing to divide by (no
    token) gives loss 0 and gradient 0.
    is_weights: truncated importance weights, factors on each token's loss, without gradient.
    ref_logprobs, kl_coef, estimator: adds kl_coef * kl_penalty(logprobs, ref_logprobs), differentiable through
    logprobs.
    entropy, ent_coef: subtracts ent_coef * entropy, differentiable through entropy.
    Returns the 0-d float32 loss and Metrics, each a masked sum / normalizer (so micro-batches add up): pg_loss,
    approx_kl = (w-1) - log w, clipfrac, dual_clipfrac, ratio_mean, kl, entropy; but ratio_max and ratio_gap =
    max |w - 1| are maxima, and tokens the mask's sum. No host sync. log w is clamped to +-20, with gradient 0 outside.
    Raises TypeError for dtypes, ValueError for the rest.
    Source: arXiv 1707.06347; clip-higher arXiv 2503.14476; dual clip arXiv 1912.09729.
    """
    op = "ppo_loss"
    tokens = PolicyTokens(old_logprobs, advantages, mask, is_weights, ref_logprobs)
    _check(op, impl, logprobs, tokens, entropy)
    if ent_coef and entropy is None:
        raise ValueError(
            f"{op}: ent_coef = {ent_coef} needs entropy, got None; take it from token_logprobs(..., "
            "return_entropy=True)"
        )
    terms = terms_of(
        op, divisor_of(op, normalizer, logprobs), clip_low, clip_high, dual_clip, kl_coef, estimator, ent_coef,
        ref_logprobs,
    )  # fmt: skip
    name = pick(op, impl, logprobs.device, FORWARD)
    if name == "ref":
        loss, figures = reference.ppo_loss(logprobs, tokens, entropy, terms)
    elif torch.is_grad_enabled() and (logprobs.requires_grad or (entropy is not None and entropy.requires_grad)):
        loss, figures = _PPOLoss.apply(logprobs, entropy, name, *tokens, *terms)  # type: ignore[no-untyped-call]
    else:
        loss, figures, _, _ = ppo_loss_fwd(logprobs, *tokens, entropy, *terms, False, name)
    return loss, Metrics(METRICS, figures)


def _check(op: str, impl: str, first: Tensor, tokens: PolicyTokens, entropy: Tensor | None) -> None:
    mask = tokens.mask
    if not checks.plain(mask, first, tokens.old_logprobs, tokens.advantages, tokens.is_weights, tokens.ref_logprobs,
                        entropy):  # fmt: skip
        others = given_tokens(tokens) | {"entropy": entropy}
        checks.tensor(op, logprobs=first, mask=mask, **others)
        checks.same_device(op, "logprobs", first, mask=mask, **others)
        checks.floating(op, impl, logprobs=first, **others)
        checks.mask_dtype(op, mask)
        checks.same_shape(op, "logprobs", first.shape, mask=mask, **others)
        checks.contiguous(op, logprobs=first, mask=mask, **others)
    checks.no_gradient(
        op,
        old_logprobs=tokens.old_logprobs,
        advantages=tokens.advantages,
        is_weights=tokens.is_weights,
        ref_logprobs=tokens.ref_logprobs,
    )


def given_tokens(tokens: PolicyTokens) -> dict[str, Tensor | None]:
    """By name, the mask aside."""
    return {
        "old_logprobs": tokens.old_logprobs,
        "advantages": tokens.advantages,
        "is_weights": tokens.is_weights,
        "ref_logprobs": tokens.ref_logprobs,
    }


def terms_of(
    op: str,
    divisor: Divisor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    estimator: str,
    ent_coef: float,
    ref_logprobs: Tensor | None,
) -> PpoTerms:
    """The numbers of a policy loss as back-ends take them. ValueError for one out of range."""
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(
            f"{op}: clip_low must be in [0, 1], got {clip_low}; the ratio is clipped to [1 - clip_low, 1 + clip_high]"
        )
    if clip_high != float("inf"):
        checks.number(op, "clip_high", clip_high, 0.0, float("inf"))
    if dual_clip is not None:
        checks.number(op, "dual_clip", dual_clip, 1.0, float("inf"), open_low=True)
    checks.number(op, "kl_coef", kl_coef, 0.0, float("inf"))
    checks.one_of(op, "estimator", estimator, ESTIMATORS)
    if ent_coef != ent_coef or ent_coef in (float("inf"), float("-inf")):
        raise ValueError(f"{op}: ent_coef must be finite, got {ent_coef}")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"{op}: kl_coef = {kl_coef} needs ref_logprobs, got None; pass them, or kl_coef=0")
    dual = 0.0 if dual_clip is None else float(dual_clip)
    return PpoTerms(*divisor, float(clip_low), float(clip_high), dual, float(kl_coef), estimator, float(ent_coef))


def divisor_of(op: str, normalizer: float | Tensor | None, like: Tensor) -> Divisor:
    """As back-ends take it: a 0-d float32 tensor, or a number where 0 means the mask's sum."""
    if normalizer is None:
        return Divisor(None, 0.0)
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0 or normalizer.dtype != torch.float32 or normalizer.device != like.device:
            raise ValueError(
                f"{op}: normalizer must be a number or a 0-d float32 tensor on {like.device}, got shape "
                f"{tuple(normalizer.shape)}, "
                f"{normalizer.dtype} on {normalizer.device}; pass normalizer.float().sum()"
            )
        checks.no_gradient(op, normalizer=normalizer)
        return Divisor(normalizer, 0.0)
    checks.number(op, "normalizer", normalizer, 0.0, float("inf"), open_low=True)
    return Divisor(None, float(normalizer))
