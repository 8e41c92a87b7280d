"""Log-probability of each label, and the entropy of each row, straight from logits.

z = logits/temperature (after softcap*tanh(logits/softcap)), L = logsumexp(z), p = softmax(z):
logprob = z[y] - L ;  H = L - sum p*z ;  dz = g*(1[y] - p) - h*p*(z - (L - H)), with p*z = 0 where p = 0.
The forward reads N*V once and writes O(N); the backward reads N*V once and writes it once, from the saved L and H.
Nothing of size N*V is saved but the logits themselves. In-place gradients over the logits are left out on purpose:
they break every second consumer of the logits."""

from typing import Any

import torch
from torch import Tensor

from . import checks, raw
from .backends import native, reference
from .dispatch import Table, late, pick
from .library import differentiable, first_derivative, primitive

FORWARD: Table = {
    "cpu": native.token_logprobs_cpu,
    "triton": late("token_logprobs_triton", "token_logprobs_triton"),
    "cuda": late("backends.native_cuda", "token_logprobs_cuda"),
    "ref": reference.token_logprobs,
}
BACKWARD: Table = {
    "cpu": native.token_logprobs_backward_cpu,
    "triton": late("token_logprobs_triton", "token_logprobs_backward_triton"),
    "cuda": late("backends.native_cuda", "token_logprobs_backward_cuda"),
}


def _forward(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, entropy: bool, ignore_index: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    raw.place("token_logprobs", impl, logits, labels)
    raw.rows("token_logprobs", logits, labels)
    return FORWARD[impl](logits, labels, temperature, softcap, entropy, ignore_index)  # type: ignore[no-any-return]


def _forward_shapes(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, entropy: bool, ignore_index: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = labels.shape
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows if entropy else (0,), dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
    )


def _backward(
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    impl: str,
) -> Tensor:
    op, wanted = "token_logprobs", (dlogprobs, dentropy, lse, entropy if dentropy is not None else None)
    raw.place(op, impl, logits, labels, *wanted)
    raw.rows(op, logits, labels)
    raw.typed(op, torch.float32, *wanted)
    raw.alike(op, lse, *wanted[3:])
    if any(x is not None and x.shape != labels.shape for x in wanted):
        raise ValueError(f"{op}: lse, entropy and gradients must have the shape {tuple(labels.shape)} of labels")
    return BACKWARD[impl](dlogprobs, dentropy, logits, labels, lse, entropy, temperature, softcap, ignore_index)  # type: ignore[no-any-return]


def _backward_shapes(dlogprobs: Tensor | None, dentropy: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


token_logprobs_fwd = primitive("token_logprobs_fwd", _forward, _forward_shapes, "(Tensor, Tensor, Tensor)")
token_logprobs_bwd = primitive("token_logprobs_bwd", _backward, _backward_shapes, "Tensor")


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
        softcap: float,
        entropy: bool,
        ignore_index: int,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, ent, lse = token_logprobs_fwd(logits, labels, temperature, softcap, entropy, ignore_index, impl)
        ctx.save_for_backward(logits, labels, lse, ent)
        ctx.scalars = temperature, softcap, ignore_index, impl
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return logprobs, ent, lse

    @staticmethod
    @first_derivative
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropy: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
        logits, labels, lse, entropy = ctx.saved_tensors
        if entropy.numel() != lse.numel():
            dentropy = None
        dlogits = token_logprobs_bwd(dlogprobs, dentropy, logits, labels, lse, entropy, *ctx.scalars)
        return dlogits, None, None, None, None, None, None


def _compose(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, entropy: bool, ignore_index: int, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if logits.requires_grad and torch.is_grad_enabled():
        return _TokenLogprobs.apply(logits, labels, temperature, softcap, entropy, ignore_index, impl)  # type: ignore[no-any-return, no-untyped-call]
    return token_logprobs_fwd(logits, labels, temperature, softcap, entropy, ignore_index, impl)  # type: ignore[no-any-return]


token_logprobs_op = differentiable("token_logprobs", _compose, "(Tensor, Tensor, Tensor)")


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int = -100,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`log_softmax(z, -1).gather(-1, labels)` with `z = logits / temperature`, and the entropy `-(p * log p).sum(-1)`
    of each row.

    logits: (..., V) float32, bfloat16 or float16; the last dimension contiguous, rows may be strided (a slice such as
    `logits[:, :-1]` needs no copy). labels: (...) int64, 0 <= label < V; `ignore_index` marks rows to skip. (The label
    -2**63 is taken: in a shard of the vocabulary it means a word of another shard, and gives logprob 0.)
    softcap: replaces logits by `softcap * tanh(logits / softcap)` before the temperature.
    Returns logprobs (...) float32 in nats, or (logprobs, entropy) with `return_entropy`; both differentiable with
    respect to logits. Skipped rows give 0, and gradient 0. A label whose logit is -inf gives -inf. A row of nothing
    but -inf gives logprob -inf, entropy 0 and gradient 0. NaN and +inf logits give NaN.
    Raises TypeError for dtypes, ValueError for devices, shapes, layout, temperature, softcap, and on a CPU for labels
    outside [0, V); on a GPU, where reading labels back would stall the queue, such a label gives NaN.
    Arithmetic is float32 throughout, and a row's result does not depend on the other rows, to the bit.
    """
    cap = _check(logits, labels, temperature, softcap, impl)
    name = pick("token_logprobs", impl, logits.device, FORWARD)
    if name == "ref":
        logprobs, entropy, _ = reference.token_logprobs(logits, labels, temperature, cap, return_entropy, ignore_index)
    else:
        logprobs, entropy, _ = _compose(logits, labels, temperature, cap, return_entropy, ignore_index, name)
    return (logprobs, entropy) if return_entropy else logprobs


def _check(logits: Tensor, labels: Tensor, temperature: float, softcap: float | None, impl: str) -> float:
    op = "token_logprobs"
    checks.tensor(op, logits=logits, labels=labels)
    checks.same_device(op, "logits", logits, labels=labels)
    checks.floating(op, impl, logits=logits)
    checks.dtype(op, "labels", labels, torch.int64)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    checks.same_shape(op, "logits without V", logits.shape[:-1], labels=labels)
    checks.unit_stride(op, "logits", logits)
    checks.number(op, "temperature", temperature, 0.0, float("inf"), open_low=True)
    if softcap is not None:
        checks.number(op, "softcap", softcap, 0.0, float("inf"), open_low=True)
    return 0.0 if softcap is None else float(softcap)
