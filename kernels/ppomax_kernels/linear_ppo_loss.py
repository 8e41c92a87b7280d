"""Clipped PPO loss straight from hidden states and the head's weight, its gradients made during the forward pass
(linear_loss.py): three GEMMs, 6NVD FLOPs, one chunk of logits. The backward scales the gradients by the upstream one,
in place, so it can be run once. With frozen weight or hidden its GEMM is skipped. Row work is that of
token_logprobs.py and ppo_loss.py: on a chunk that stays in cache, a kernel that fuses the two has little left to
save."""

import torch
from torch import Tensor

from . import checks, chunks, raw
from .backends import reference
from .chunks import Rows, kept_rows
from .dispatch import Table, pick
from .library import differentiable, primitive
from .linear_loss import composed, loss_and_gradients, loss_shapes
from .metrics import Metrics
from .ppo_loss import FORWARD as LOSS
from .ppo_loss import MAXIMA, METRICS, divisor_of, given_tokens, terms_of
from .terms import Head, LinearInputs, Need, PolicyTokens, PpoTerms, Walk
from .vocab_shard import VocabShard

FORWARD: Table = {**LOSS, "cuda": LOSS["triton"]}
"""The loss over the tokens of a chunk; with impl="cuda" the rows of logits go through CUDA kernels, the tokens through
Triton's."""


def _forward(
    inputs: LinearInputs,
    tokens: PolicyTokens,
    terms: PpoTerms,
    head: Head,
    walk: Walk,
    need: Need,
    impl: str,
    *,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op, labels = "linear_ppo_loss", inputs.labels
    raw.linear(op, impl, inputs)
    raw.place(op, impl, labels, *tokens, terms.normalizer)
    raw.each(op, len(labels), *tokens)
    raw.mask(op, tokens.mask)
    raw.number(op, terms.normalizer)
    chunks.check_labels(op, labels, inputs.weight, head.ignore_index, shard)
    keep = labels != head.ignore_index
    kept = kept_rows(keep if tokens.mask is None else keep & tokens.mask.bool(), walk.kept)
    if terms.normalizer is None and terms.norm_value == 0.0:
        terms = terms._replace(norm_value=float(kept[1]))

    def row_loss(rows: Rows, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        own = PolicyTokens(
            rows.of(tokens.old_logprobs), rows.of(tokens.advantages), None, rows.of_maybe(tokens.is_weights),
            rows.of_maybe(tokens.ref_logprobs),
        )  # fmt: skip
        loss, figure, dlogprobs, scale = FORWARD[impl](logprobs, own, entropy, terms, any(need))
        dentropy = (scale * -terms.ent_coef).expand(logprobs.shape) if terms.ent_coef else None
        return loss, figure, dlogprobs * scale, dentropy

    losses, figures, grads = loss_and_gradients(row_loss, inputs, head, walk, need, kept, impl, shard)
    loss, metrics = _total(losses, figures, inputs.hidden)
    return loss, metrics, grads.dhidden, grads.dweight, grads.dbias


def _total(losses: list[Tensor], figures: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Over chunks: sums of sums, the maximum of maxima."""
    if not losses:
        return like.new_zeros((), dtype=torch.float32), like.new_zeros(len(METRICS), dtype=torch.float32)
    every = torch.stack(figures)
    metrics = every.sum(0)
    for largest in map(METRICS.index, MAXIMA):
        metrics[largest] = every[:, largest].max()
    return torch.stack(losses).sum(), metrics


def _shapes(
    inputs: LinearInputs, tokens: PolicyTokens, terms: PpoTerms, head: Head, walk: Walk, need: Need, impl: str
) -> tuple[Tensor, ...]:
    return loss_shapes(inputs, len(METRICS), need)


linear_ppo_loss_fwd = primitive(
    "linear_ppo_loss_fwd",
    _forward,
    _shapes,
    "(Tensor loss, Tensor metrics, Tensor dhidden, Tensor dweight, Tensor dbias)",
    by_torch=True,
)


def _compose(
    inputs: LinearInputs,
    tokens: PolicyTokens,
    terms: PpoTerms,
    head: Head,
    walk: Walk,
    impl: str,
    *,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor]:
    groups = tokens, terms, head, walk
    return composed("linear_ppo_loss", linear_ppo_loss_fwd, _forward, inputs, groups, impl, shard)


linear_ppo_loss_op = differentiable("linear_ppo_loss", _compose, "(Tensor loss, Tensor metrics)")


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
    inputs = LinearInputs(hidden, weight, labels, bias)
    tokens = PolicyTokens(old_logprobs, advantages, mask, is_weights, ref_logprobs)
    chunks.check(op, impl, inputs, chunk_tokens, kept)
    _check(op, impl, inputs, tokens)
    head = chunks.head_of(op, temperature, softcap, ignore_index, weight, shard)
    terms = terms_of(
        op, divisor_of(op, normalizer, hidden), clip_low, clip_high, dual_clip, kl_coef, estimator, ent_coef,
        ref_logprobs,
    )  # fmt: skip
    name = pick(op, impl, hidden.device, FORWARD)
    if name == "ref":
        chunks.refuse_shard(op, shard)
        loss, figures = _reference(inputs, tokens, terms, head)
    else:
        walk = chunks.walk_of(
            kept, chunk_tokens or chunks.default_chunk(len(weight), hidden.device.type), batch_invariant
        )
        if shard is None and torch.compiler.is_compiling():  # one opaque op: dynamo would unroll the chunks
            loss, figures = linear_ppo_loss_op(*inputs, *tokens, *terms, *head, *walk, name)
        else:
            loss, figures = _compose(inputs, tokens, terms, head, walk, name, shard=shard)
    return loss, Metrics(METRICS, figures)


def _check(op: str, impl: str, inputs: LinearInputs, tokens: PolicyTokens) -> None:
    """What linear_ppo_loss asks of its rows besides what all linear ops do."""
    others, mask = given_tokens(tokens), tokens.mask
    checks.tensor(op, mask=mask, **others)
    checks.same_device(op, "hidden", inputs.hidden, mask=mask, **others)
    checks.floating(op, impl, **others)
    checks.mask_dtype(op, mask)
    checks.same_shape(op, "labels", inputs.labels.shape, mask=mask, **others)
    checks.contiguous(op, mask=mask, **others)
    checks.no_gradient(op, **others)


def _reference(inputs: LinearInputs, tokens: PolicyTokens, terms: PpoTerms, head: Head) -> tuple[Tensor, Tensor]:
    labels = inputs.labels
    chunks.check_labels("linear_ppo_loss", labels, inputs.weight, head.ignore_index, None)
    keep = labels != head.ignore_index
    keep = keep if tokens.mask is None else keep & tokens.mask.bool()
    counted = inputs._replace(labels=labels.masked_fill(~keep, head.ignore_index))
    logprobs, entropy, _ = reference.linear_token_logprobs(counted, head, True)
    return reference.ppo_loss(logprobs, tokens._replace(mask=keep), entropy, terms)
