"""Clipped PPO loss straight from hidden states and the head's weight, its gradients made during the forward pass
(linear_loss.py): three GEMMs, 6NVD FLOPs, one chunk of logits. The backward scales the gradients by the upstream one,
in place, so it can be run once. With frozen weight or hidden its GEMM is skipped. Row work is that of
token_logprobs.py and ppo_loss.py: on a chunk that stays in cache, a kernel that fuses the two has little left to
save."""

from typing import Any

import torch
from torch import Tensor

from . import checks, chunks, ppo_loss, reference
from .chunks import Rows, kept_rows
from .dispatch import pick
from .library import differentiable, primitive
from .linear_loss import composed, gradient_shapes, loss_and_gradients
from .metrics import Metrics
from .ppo_loss import FORWARD, METRICS, normalizer_of
from .vocab_shard import VocabShard


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    is_weights: Tensor | None,
    ref_logprobs: Tensor | None,
    normalizer: Tensor | None,
    norm_value: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    estimator: str,
    ent_coef: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
    kept: int,
    chunk: int,
    invariant: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    *,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks.check_labels("linear_ppo_loss", labels, weight, ignore_index, shard)
    keep = labels != ignore_index
    index, n = kept_rows(keep if mask is None else keep & mask.bool(), kept)
    need = (need_hidden, need_weight, need_bias)
    if normalizer is None and norm_value == 0.0:
        norm_value = float(n)

    def row_loss(rows: Rows, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        loss, figure, dlogprobs, scale = FORWARD[impl](
            logprobs, rows.of(old_logprobs), rows.of(advantages), None, rows.of_maybe(is_weights),
            rows.of_maybe(ref_logprobs), entropy, normalizer, norm_value, clip_low, clip_high, dual_clip, kl_coef,
            estimator, ent_coef, any(need),
        )  # fmt: skip
        dentropy = (scale * -ent_coef).expand(logprobs.shape) if ent_coef else None
        return loss, figure, dlogprobs * scale, dentropy

    losses, figures, grads = loss_and_gradients(
        row_loss,
        hidden,
        weight,
        labels,
        bias,
        (temperature, softcap, ignore_index),
        index,
        n,
        (chunk, invariant),
        need,
        impl,
        shard,
    )
    loss, metrics = _total(losses, figures, hidden)
    return loss, metrics, grads.dhidden, grads.dweight, grads.dbias


def _total(losses: list[Tensor], figures: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Over chunks: sums of sums, the maximum of maxima."""
    if not losses:
        return like.new_zeros((), dtype=torch.float32), like.new_zeros(len(METRICS), dtype=torch.float32)
    every = torch.stack(figures)
    metrics = every.sum(0)
    largest = METRICS.index("ratio_max")
    metrics[largest] = every[:, largest].max()
    return torch.stack(losses).sum(), metrics


def _shapes(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    f32 = torch.float32
    return (
        hidden.new_empty((), dtype=f32),
        hidden.new_empty((len(METRICS),), dtype=f32),
        *gradient_shapes(hidden, weight, *rest[-4:-1]),
    )


_ARGS = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor old_logprobs, Tensor advantages, Tensor? mask, "
    "Tensor? is_weights,"
    " Tensor? ref_logprobs, Tensor? normalizer, float norm_value, float clip_low, float clip_high, float dual_clip, "
    "float kl_coef,"
    " str estimator, float ent_coef, float temperature, float softcap, int ignore_index, int kept, int chunk, bool "
    "invariant"
)
linear_ppo_loss_fwd = primitive(
    f"linear_ppo_loss_fwd({_ARGS}, bool need_hidden, bool need_weight, bool need_bias, str impl)"
    " -> (Tensor loss, Tensor metrics, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _forward,
    _shapes,
)


def _compose(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any, shard: VocabShard | None = None
) -> tuple[Tensor, Tensor]:
    return composed("linear_ppo_loss", linear_ppo_loss_fwd, _forward, hidden, weight, labels, bias, rest, shard)


linear_ppo_loss_op = differentiable(f"linear_ppo_loss({_ARGS}, str impl) -> (Tensor loss, Tensor metrics)", _compose)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    normalizer: float | Tensor | None = None,
    is_weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    estimator: str = "k3",
    ent_coef: float = 0.0,
    ignore_index: int = -100,
    kept: int | None = None,
    chunk_tokens: int | None = None,
    batch_invariant: bool = False,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Metrics]:
    """`ppo_loss(*linear_token_logprobs(hidden, weight, labels, return_entropy=True), ...)` with 6NVD instead of 8NVD
    FLOPs.

    hidden (N, D), weight (V, D), bias (V,), labels (N,), temperature, softcap, kept, chunk_tokens, batch_invariant,
    shard: as in `linear_token_logprobs`. old_logprobs, advantages, is_weights, ref_logprobs (N,), mask (N,),
    clip_low, clip_high, dual_clip, normalizer, kl_coef,
    estimator, ent_coef: as in `ppo_loss` (the entropy is that of the rows, always measured; its gradient is exact).
    Rows that are masked or whose label is `ignore_index` do not count (nor in the default normalizer) and cost no
    GEMM work; `kept`, if given, counts the others.
    Returns the 0-d float32 loss and Metrics as `ppo_loss` does. Gradients of hidden, weight and bias are made here
    and scaled by the backward,
    which can be run once: a second one raises RuntimeError. Through the other arguments no gradient flows, and one
    that requires it is refused.
    Raises TypeError for dtypes, ValueError for the rest.
    """
    op = "linear_ppo_loss"
    hidden, weight, bias = chunks.cast_for_autocast(hidden, weight, bias)  # type: ignore[assignment]
    chunks.check(op, impl, hidden, weight, labels, bias, chunk_tokens, kept)
    others = dict(old_logprobs=old_logprobs, advantages=advantages, is_weights=is_weights, ref_logprobs=ref_logprobs)
    checks.tensor(op, mask=mask, **others)
    checks.same_device(op, "hidden", hidden, mask=mask, **others)
    checks.floating(op, impl, **others)
    checks.mask_dtype(op, mask)
    checks.same_shape(op, "labels", labels.shape, mask=mask, **others)
    checks.contiguous(op, mask=mask, **others)
    checks.no_gradient(op, **others)
    cap = chunks.check_head(op, temperature, softcap, weight, shard)
    ppo_loss.check_scalars(op, clip_low, clip_high, dual_clip, kl_coef, estimator, ent_coef, ref_logprobs)
    norm_tensor, norm_value = normalizer_of(op, normalizer, hidden)
    name = pick(op, impl, hidden.device, FORWARD)
    terms = (
        norm_tensor, norm_value, float(clip_low), float(clip_high), 0.0 if dual_clip is None else float(dual_clip),
        float(kl_coef), estimator, float(ent_coef),
    )  # fmt: skip
    if name == "ref":
        chunks.refuse_shard(op, shard)
        chunks.check_labels(op, labels, weight, ignore_index, None)
        keep = labels != ignore_index if mask is None else (labels != ignore_index) & mask.bool()
        counted = labels.masked_fill(~keep, ignore_index)
        logprobs, entropy, _ = reference.linear_token_logprobs(
            hidden, weight, counted, bias, temperature, cap, True, ignore_index
        )
        loss, figures = reference.ppo_loss(
            logprobs, old_logprobs, advantages, keep, is_weights, ref_logprobs, entropy, *terms
        )
    else:
        size = chunk_tokens or chunks.default_chunk(weight.shape[0], hidden.device.type)
        args = (
            hidden, weight, labels, bias, old_logprobs, advantages, mask, is_weights, ref_logprobs, *terms,
            float(temperature), cap, ignore_index, -1 if kept is None else kept, size, batch_invariant, name,
        )  # fmt: skip
        if shard is None and torch.compiler.is_compiling():  # one opaque op: dynamo would unroll the chunks
            loss, figures = linear_ppo_loss_op(*args)
        else:
            loss, figures = _compose(*args, shard=shard)
    return loss, Metrics(METRICS, figures)
