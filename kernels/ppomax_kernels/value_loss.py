"""Clipped value loss of PPO, in one pass: 1/2 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), summed
over the mask / normalizer. The forward writes each token's gradient too (4 B), so the backward is one scaling. Where
the clipped error is the larger one the gradient is 0. A masked token is never read into a result: NaN there is
harmless."""

from typing import Any

import torch
from torch import Tensor

from . import checks, raw
from .backends import native, reference
from .dispatch import Table, late, pick
from .library import first_derivative, primitive
from .metrics import VALUE_METRICS, Metrics
from .ppo_loss import divisor_of

METRICS = VALUE_METRICS

FORWARD: Table = {
    "cpu": native.value_loss_cpu,
    "triton": late("value_loss_triton", "value_loss_triton"),
    "ref": reference.value_loss,
}


def _forward(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    norm_value: float,
    clip: float,
    need_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw.place("value_loss", impl, values, old_values, returns, mask, normalizer)
    raw.alike("value_loss", values, old_values, returns, mask)
    raw.mask("value_loss", mask)
    raw.number("value_loss", normalizer)
    return FORWARD[impl](values, old_values, returns, mask, normalizer, norm_value, clip, need_grad)  # type: ignore[no-any-return]


def _shapes(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    norm_value: float,
    clip: float,
    need_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    f32 = torch.float32
    return (
        values.new_empty((), dtype=f32),
        values.new_empty((len(METRICS),), dtype=f32),
        values.new_empty(values.shape if need_grad else (0,), dtype=f32),
        values.new_empty((), dtype=f32),
    )


value_loss_fwd = primitive(
    "value_loss_fwd", _forward, _shapes, "(Tensor loss, Tensor metrics, Tensor dvalues, Tensor scale)"
)


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        mask: Tensor | None,
        normalizer: Tensor | None,
        norm_value: float,
        clip: float,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        loss, metrics, dvalues, scale = value_loss_fwd(
            values, old_values, returns, mask, normalizer, norm_value, clip, True, impl
        )
        ctx.save_for_backward(dvalues, scale)
        ctx.dtype = values.dtype
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    @first_derivative
    def backward(ctx: Any, dloss: Tensor | None, dmetrics: None) -> tuple[Tensor | None, ...]:
        d, scale = ctx.saved_tensors
        nothing = (None,) * 7
        return ((d * (dloss * scale)).to(ctx.dtype) if dloss is not None else None), *nothing


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Metrics]:
    """`0.5 * (mask * max((values-returns)**2, (old_values + (values-old_values).clamp(-clip, clip) -
    returns)**2)).sum() / normalizer`.

    All tensors have one shape, (N,) or any other, contiguous, float32, bfloat16 or float16 each; mask is bool or uint8.
    clip: absolute, in units of the values, >= 0; None does not clip. normalizer: as in `ppo_loss`.
    Returns the 0-d float32 loss and Metrics, each a masked sum / normalizer: v_loss, clipfrac, value_mean,
    return_mean, squared_error (unclipped); but tokens the mask's sum. Differentiable through values. No token gives
    loss 0 and gradient 0.
    Raises TypeError for dtypes, ValueError for the rest. Source: arXiv 2307.04964, section 3.3; OpenAI baselines' PPO2.
    """
    op = "value_loss"
    if not checks.plain(mask, values, old_values, returns):
        checks.tensor(op, values=values, old_values=old_values, returns=returns, mask=mask)
        checks.same_device(op, "values", values, old_values=old_values, returns=returns, mask=mask)
        checks.floating(op, impl, values=values, old_values=old_values, returns=returns)
        checks.mask_dtype(op, mask)
        checks.same_shape(op, "values", values.shape, old_values=old_values, returns=returns, mask=mask)
        checks.contiguous(op, values=values, old_values=old_values, returns=returns, mask=mask)
    if clip is not None:
        checks.number(op, "clip", clip, 0.0, float("inf"))
    checks.no_gradient(op, old_values=old_values, returns=returns)
    divisor = divisor_of(op, normalizer, values)
    name = pick(op, impl, values.device, FORWARD)
    inputs, limit = (values, old_values, returns, mask), -1.0 if clip is None else float(clip)
    if name == "ref":
        loss, figures = reference.value_loss(*inputs, *divisor, limit)
    elif values.requires_grad and torch.is_grad_enabled():
        loss, figures = _ValueLoss.apply(*inputs, *divisor, limit, name)  # type: ignore[no-untyped-call]
    else:
        loss, figures, _, _ = value_loss_fwd(*inputs, *divisor, limit, False, name)
    return loss, Metrics(METRICS, figures)
