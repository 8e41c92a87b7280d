"""What linear_ppo_loss and linear_nll share: a loss per token from logits that exist only as one chunk, gradients
made on the way. A token's loss depends on its own logprob and entropy alone, so its gradient is known as soon as its
row of logits is. For each chunk of tokens: logits = hidden @ weight.T (GEMM 1), row statistics, loss terms, logits
overwritten by their gradient, dhidden (GEMM 2), dweight += (GEMM 3, float32): 6NVD FLOPs in all, where autograd over
a fused logprob op needs 8NVD. Memory: one chunk, and the gradients themselves."""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunks
from .chunks import Gradients, Logits, Rows
from .library import first_derivative
from .terms import Head, LinearInputs, Need, Walk
from .token_logprobs import BACKWARD, FORWARD
from .vocab_shard import VocabShard

# rows, logprobs, entropy -> loss (), figures (M,), dloss/dlogprobs, dloss/dentropy or None
RowLoss = Callable[[Rows, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None]]


class Losses(NamedTuple):
    """Of every chunk, and the gradients of all."""

    losses: list[Tensor]
    figures: list[Tensor]
    gradients: Gradients


def loss_and_gradients(
    row_loss: RowLoss,
    inputs: LinearInputs,
    head: Head,
    walk: Walk,
    need: Need,
    kept: tuple[Tensor | None, int],
    impl: str,
    shard: VocabShard | None,
) -> Losses:
    """Losses and figures of each chunk, and the gradients. kept: indices of the rows that count (None: all of them)
    and how many, as kept_rows gives them."""
    hidden, weight, labels, bias = inputs
    index, n = kept
    grads = Gradients(hidden, weight, need, n, impl)
    chunk = chunks.even_chunk(walk.chunk, n, walk.invariant)
    logits = Logits(weight, bias, n, walk._replace(chunk=chunk), impl)
    local = labels if shard is None else shard.local_labels(labels, head.ignore_index)
    numbers = head.temperature, head.softcap
    losses, figures = [], []
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in chunks.row_chunks(index, n, chunk):
            h, y = rows.of(hidden), rows.of(local)
            z = logits.of(h)
            logprobs, entropy, lse = FORWARD[impl](z, y, *numbers, True, chunks.NONE_IGNORED)
            if shard is not None:
                logprobs, entropy, lse = shard.combine(y, logprobs, entropy, lse)
            loss, figure, dlogprobs, dentropy = row_loss(rows, logprobs, entropy)
            losses.append(loss)
            figures.append(figure)
            if any(need):
                dz = BACKWARD[impl](dlogprobs, dentropy, z, y, lse, entropy, *numbers, chunks.NONE_IGNORED, z)
                grads.add(dz, h, rows, logits)
    if shard is not None and need.need_hidden:
        shard.sum(grads.dhidden)
    return Losses(losses, figures, grads)


class ReadyGradients(torch.autograd.Function):
    """A loss whose gradients of hidden, weight and bias `compute(need...)` makes during the forward; the backward
    scales them in place, once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, compute: Any, op: str
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, *grads = compute(*ctx.needs_input_grad[:3])
        ctx.save_for_backward(*grads)
        ctx.op, ctx.spent = op, False
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @first_derivative
    def backward(ctx: Any, dloss: Tensor | None, dmetrics: None) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                f"{ctx.op}: a second backward through one loss is not possible (its gradients are scaled in place); "
                f"call {ctx.op} again"
            )
        ctx.spent = True
        if dloss is None:
            return (None,) * 5
        grads = [scaled(g, dloss, dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *(g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad)), None, None


def composed(
    op: str,
    primitive: Callable[..., Any],
    forward: Callable[..., Any],
    inputs: LinearInputs,
    groups: tuple[tuple[Any, ...], ...],
    impl: str,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor]:
    """Loss and metrics by the registered `primitive`, or by its body `forward` for a shard, which no schema can hold;
    gradients wait for the backward if one is wanted. groups: what both take between inputs and Need."""
    hidden, weight, labels, bias = inputs

    def compute(*need: bool) -> tuple[Tensor, ...]:
        plain = LinearInputs(hidden.detach(), weight.detach(), labels, None if bias is None else bias.detach())
        if shard is not None:
            return forward(plain, *groups, Need(*need), impl, shard=shard)  # type: ignore[no-any-return]
        return primitive(*plain, *chain.from_iterable(groups), *need, impl)  # type: ignore[no-any-return]

    if wants_gradient(hidden, weight, bias):
        return ReadyGradients.apply(hidden, weight, bias, compute, op)  # type: ignore[no-any-return, no-untyped-call]
    return compute(False, False, False)[:2]  # type: ignore[return-value]


def scaled(gradient: Tensor, dloss: Tensor, dtype: torch.dtype | None) -> Tensor:
    """gradient * dloss in the dtype of what it is of, in one pass: in place where that is the gradient's own."""
    if is_one(dloss):
        return gradient
    if dtype is None or gradient.dtype == dtype:
        return gradient.mul_(dloss)
    return torch.mul(gradient, dloss, out=torch.empty_like(gradient, dtype=dtype))


def is_one(x: Tensor) -> bool:
    """True if x is known to be 1 without waiting for a device: then scaling V x D numbers by it can be left out."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling() and float(x) == 1.0


def wants_gradient(*xs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in xs)


def gradient_shapes(hidden: Tensor, weight: Tensor, need: Need) -> tuple[Tensor, Tensor, Tensor]:
    f32 = torch.float32
    return (
        hidden.new_empty(hidden.shape if need.need_hidden else (0,)),
        weight.new_empty(weight.shape, dtype=f32) if need.need_weight else weight.new_empty((0,)),
        weight.new_empty(weight.shape[:1], dtype=f32) if need.need_bias else weight.new_empty((0,)),
    )


def loss_shapes(inputs: LinearInputs, metrics: int, need: Need) -> tuple[Tensor, ...]:
    """Of loss, so many metrics, and gradients."""
    hidden, f32 = inputs.hidden, torch.float32
    loss, figures = hidden.new_empty((), dtype=f32), hidden.new_empty((metrics,), dtype=f32)
    return loss, figures, *gradient_shapes(hidden, inputs.weight, need)
