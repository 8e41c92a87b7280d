"""Mean negative log-likelihood (language-model cross-entropy) straight from hidden states and the head's weight, its
gradients made during the forward pass (linear_loss.py): three GEMMs, 6NVD FLOPs, one chunk of logits. Serves SFT and
the ptx term of PPO."""

import torch
from torch import Tensor

from . import chunks, raw
from .backends import reference
from .chunks import Rows, kept_rows
from .dispatch import pick
from .library import differentiable, primitive
from .linear_loss import composed, loss_and_gradients, loss_shapes
from .metrics import NLL_METRICS, Metrics
from .ppo_loss import divisor_of
from .terms import Divisor, Head, LinearInputs, Need, Walk
from .token_logprobs import FORWARD
from .vocab_shard import VocabShard

METRICS = NLL_METRICS


def _forward(
    inputs: LinearInputs,
    divisor: Divisor,
    head: Head,
    walk: Walk,
    need: Need,
    impl: str,
    *,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, labels = inputs.hidden, inputs.labels
    raw.linear("linear_nll", impl, inputs)
    raw.place("linear_nll", impl, hidden, divisor.normalizer)
    raw.number("linear_nll", divisor.normalizer)
    chunks.check_labels("linear_nll", labels, inputs.weight, head.ignore_index, shard)
    kept = kept_rows(labels != head.ignore_index, walk.kept)
    total = divisor.normalizer
    if total is None:
        total = hidden.new_full((), divisor.norm_value or float(kept[1]), dtype=torch.float32)
    share = torch.where(total > 0, 1.0 / total, 0.0)

    def row_loss(rows: Rows, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        nll = -logprobs.sum() * share
        figures = torch.stack([nll, entropy.sum() * share, share.new_full((), float(logprobs.shape[0]))])
        return nll, figures, (-share).expand(logprobs.shape), None

    losses, figures, grads = loss_and_gradients(row_loss, inputs, head, walk, need, kept, impl, shard)
    loss = torch.stack(losses).sum() if losses else share.new_zeros(())
    metrics = torch.stack(figures).sum(0) if figures else share.new_zeros(len(METRICS))
    return loss, metrics, grads.dhidden, grads.dweight, grads.dbias


def _shapes(
    inputs: LinearInputs, divisor: Divisor, head: Head, walk: Walk, need: Need, impl: str
) -> tuple[Tensor, ...]:
    return loss_shapes(inputs, len(METRICS), need)


linear_nll_fwd = primitive(
    "linear_nll_fwd",
    _forward,
    _shapes,
    "(Tensor loss, Tensor metrics, Tensor dhidden, Tensor dweight, Tensor dbias)",
    by_torch=True,
)


def _compose(
    inputs: LinearInputs, divisor: Divisor, head: Head, walk: Walk, impl: str, *, shard: VocabShard | None = None
) -> tuple[Tensor, Tensor]:
    return composed("linear_nll", linear_nll_fwd, _forward, inputs, (divisor, head, walk), impl, shard)


linear_nll_op = differentiable("linear_nll", _compose, "(Tensor loss, Tensor metrics)")


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    kept: int | None = None,
    chunk_tokens: int | None = None,
    batch_invariant: bool = False,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Metrics]:
    """`cross_entropy(hidden @ weight.T + bias, labels, reduction="sum") / normalizer`, without ever holding N x V
    logits.

    hidden (N, D), weight (V, D), bias (V,), labels (N,), temperature, softcap, ignore_index, kept, chunk_tokens,
    batch_invariant, shard: as in `linear_token_logprobs`; labels must be shifted by the caller (label of row t =
    token t+1). normalizer: the number of rows that are not ignored by default, or as in `ppo_loss`.
    Returns the 0-d float32 loss and Metrics nll, entropy (sums / normalizer) and tokens. Differentiable with respect
    to hidden, weight and bias; the gradients are made here, and a second backward raises RuntimeError.
    Raises TypeError for dtypes, ValueError for the rest.
    """
    op = "linear_nll"
    hidden, weight, bias = chunks.cast_for_autocast(hidden, weight, bias)  # type: ignore[assignment]
    inputs = LinearInputs(hidden, weight, labels, bias)
    chunks.check(op, impl, inputs, chunk_tokens, kept)
    head = chunks.head_of(op, temperature, softcap, ignore_index, weight, shard)
    divisor = divisor_of(op, normalizer, hidden)
    name = pick(op, impl, hidden.device, FORWARD)
    if name == "ref":
        chunks.refuse_shard(op, shard)
        loss, figures = _reference(inputs, divisor, head)
    else:
        walk = chunks.walk_of(
            kept, chunk_tokens or chunks.default_chunk(len(weight), hidden.device.type), batch_invariant
        )
        if shard is None and torch.compiler.is_compiling():  # one opaque op: dynamo would unroll the chunks
            loss, figures = linear_nll_op(*inputs, *divisor, *head, *walk, name)
        else:
            loss, figures = _compose(inputs, divisor, head, walk, name, shard=shard)
    return loss, Metrics(METRICS, figures)


def _reference(inputs: LinearInputs, divisor: Divisor, head: Head) -> tuple[Tensor, Tensor]:
    chunks.check_labels("linear_nll", inputs.labels, inputs.weight, head.ignore_index, None)
    logprobs, entropy, _ = reference.linear_token_logprobs(inputs, head, True)
    tokens = (inputs.labels != head.ignore_index).sum().to(logprobs.dtype)
    total = tokens if divisor.norm_value == 0.0 else torch.full_like(tokens, divisor.norm_value)
    if divisor.normalizer is not None:
        total = divisor.normalizer
    share = torch.where(total > 0, 1.0 / total, 0.0)
    loss = -logprobs.sum() * share
    return loss, torch.stack([loss, entropy.sum() * share, tokens]).detach()
