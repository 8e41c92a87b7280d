"""torch.nn.functional.linear on a CPU in float32 by our own product, with its gradients by the same: on processors that
torch's BLAS was not made for it takes half the time (bench/LOG.md), and a row of the result never depends on the other
rows. Internal to the engine's scoring and update."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import first_derivative
from .packed_linear import product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parts: Tensor) -> Tensor:
        """x (N, D); parts: `count` weights, then their biases or none."""
        weights, biases = parts[:count], parts[count:]
        ctx.save_for_backward(x, *weights)
        ctx.biases = len(biases)
        return product(x, _joined(weights), _joined(biases) if biases else None)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        wants_x, _, *wants = ctx.needs_input_grad
        heights, count = [len(w) for w in weights], len(weights)
        of_weights = of_biases = (None,) * count
        if any(wants[:count]):
            of_weights = product(dy.t(), x.t()).split(heights)
        if any(wants[count:]):
            of_biases = dy.sum(0).split(heights)
        grads = [*of_weights, *of_biases[: ctx.biases]]
        dx = product(dy, _joined(weights).t()) if wants_x else None
        return dx, None, *(g if wanted else None for g, wanted in zip(grads, wants, strict=True))


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> Tensor:
    """`torch.nn.functional.linear(x, torch.cat(weights), torch.cat(biases))`, without holding what is joined until the
    backward: x (..., D), weights (out, D) each and as many biases (out,), or none, in float32 on a CPU. Once
    differentiable."""
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), len(weights), *weights, *biases)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
