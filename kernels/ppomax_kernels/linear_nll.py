"""Mean negative log-likelihood (language-model cross-entropy) straight from hidden states and the head's weight, its
gradients made during the
forward pass (linear_loss.py): three GEMMs, 6NVD FLOPs, one chunk of logits. Serves SFT and the ptx term of PPO."""

from typing import Any

import torch
from torch import Tensor

from . import chunks, reference
from .chunks import Rows, kept_rows
from .dispatch import pick
from .library import differentiable, primitive
from .linear_loss import composed, gradient_shapes, loss_and_gradients
from .metrics import Metrics
from .ppo_loss import normalizer_of
from .token_logprobs import FORWARD
from .vocab_shard import VocabShard

METRICS = ("nll", "entropy", "tokens")


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    normalizer: Tensor | None,
    norm_value: float,
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
    chunks.check_labels("linear_nll", labels, weight, ignore_index, shard)
    index, n = kept_rows(labels != ignore_index, kept)
    total = normalizer if normalizer is not None else hidden.new_tensor(norm_value or float(n), dtype=torch.float32)
    share = torch.where(total > 0, 1.0 / total, 0.0)

    def row_loss(rows: Rows, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        nll = -logprobs.sum() * share
        figures = torch.stack([nll, entropy.sum() * share, share.new_tensor(float(logprobs.shape[0]))])
        return nll, figures, (-share).expand(logprobs.shape), None

    need = (need_hidden, need_weight, need_bias)
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
    loss = torch.stack(losses).sum() if losses else share.new_zeros(())
    metrics = torch.stack(figures).sum(0) if figures else share.new_zeros(len(METRICS))
    return loss, metrics, grads.dhidden, grads.dweight, grads.dbias


def _shapes(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    f32 = torch.float32
    return (
        hidden.new_empty((), dtype=f32),
        hidden.new_empty((len(METRICS),), dtype=f32),
        *gradient_shapes(hidden, weight, *rest[-4:-1]),
    )


_ARGS = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? normalizer, float norm_value, float "
    "temperature, float softcap,"
    " int ignore_index, int kept, int chunk, bool invariant"
)
linear_nll_fwd = primitive(
    f"linear_nll_fwd({_ARGS}, bool need_hidden, bool need_weight, bool need_bias, str impl)"
    " -> (Tensor loss, Tensor metrics, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _forward,
    _shapes,
)


def _compose(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any, shard: VocabShard | None = None
) -> tuple[Tensor, Tensor]:
    return composed("linear_nll", linear_nll_fwd, _forward, hidden, weight, labels, bias, rest, shard)


linear_nll_op = differentiable(f"linear_nll({_ARGS}, str impl) -> (Tensor loss, Tensor metrics)", _compose)


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
    chunks.check(op, impl, hidden, weight, labels, bias, chunk_tokens, kept)
    cap = chunks.check_head(op, temperature, softcap, weight, shard)
    norm_tensor, norm_value = normalizer_of(op, normalizer, hidden)
    name = pick(op, impl, hidden.device, FORWARD)
    if name == "ref":
        chunks.refuse_shard(op, shard)
        chunks.check_labels(op, labels, weight, ignore_index, None)
        logprobs, entropy, _ = reference.linear_token_logprobs(
            hidden, weight, labels, bias, temperature, cap, True, ignore_index
        )
        tokens = (labels != ignore_index).sum().to(logprobs.dtype)
        total = (
            norm_tensor if norm_tensor is not None else (tokens if norm_value == 0.0 else tokens.new_tensor(norm_value))
        )
        share = torch.where(total > 0, 1.0 / total, 0.0)
        loss = -logprobs.sum() * share
        figures = torch.stack([loss, entropy.sum() * share, tokens]).detach()
    else:
        size = chunk_tokens or chunks.default_chunk(weight.shape[0], hidden.device.type)
        args = (
            hidden, weight, labels, bias, norm_tensor, norm_value, float(temperature), cap, ignore_index,
            -1 if kept is None else kept, size, batch_invariant, name,
        )  # fmt: skip
        if shard is None and torch.compiler.is_compiling():  # one opaque op: dynamo would unroll the chunks
            loss, figures = linear_nll_op(*args)
        else:
            loss, figures = _compose(*args, shard=shard)
    return loss, Metrics(METRICS, figures)
