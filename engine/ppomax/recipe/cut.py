"""Log-probabilities and policy loss over the tokens that a cut left to each draw (rollout/kept.py): the softmax runs
over each token's recorded set, so ratio, KL and entropy are those of the distribution that was sampled from. In plain
torch, some rows of logits at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import ppomax_kernels as K
import torch
from ppomax_kernels.linear_loss import ReadyGradients
from ppomax_kernels.ppo_loss import MAXIMA
from ppomax_kernels.ppo_loss import METRICS as PG_METRICS
from torch import Tensor

from ppomax.models import Head
from ppomax.rollout.kept import column_of, only_kept

CHUNK_BYTES = 2**26
"""Of a chunk's float32 logits."""


def cut_logprobs(hidden: Tensor, head: Head, labels: Tensor, kept: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`log_softmax(head.logits(hidden) / temperature, over the kept tokens)[labels]` and its entropy, (N,) float32
    each. A label outside its set has -inf."""
    rows = chunk_rows(head)
    parts = [
        _chunk(h, head.weight, head.bias, head, y, k, temperature)
        for h, y, k in zip(hidden.split(rows), labels.split(rows), kept.split(rows), strict=True)
    ]
    logprobs, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
    return logprobs, entropy


def cut_ppo_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    tokens: dict[str, Tensor | None],
    kept: Tensor,
    *,
    temperature: float,
    **terms: Any,
) -> tuple[Tensor, K.Metrics]:
    """`K.ppo_loss(cut_logprobs(...), **tokens, **terms)` with gradients of hidden and head made on the way, a chunk at
    a time. tokens: (N,) arguments of ppo_loss, by name. terms: the others, `normalizer` among them."""
    rows = chunk_rows(head)

    def compute(*need: bool) -> tuple[Tensor, ...]:
        wanted = [i for i, x in enumerate(need) if x]
        losses, figures = [], []
        dhidden: list[Tensor] = []
        sums: dict[int, Tensor] = {}
        for at in torch.arange(len(labels), device=labels.device).split(rows):
            cut = _Leaves(hidden.detach()[at], head.weight.detach(), None if head.bias is None else head.bias.detach())
            leaves = [x.requires_grad_() for i, x in enumerate(cut) if i in wanted and x is not None]
            with torch.enable_grad():
                logprobs, entropy = _chunk(*cut, head, labels[at], kept[at], temperature)
                part: dict[str, Any] = {name: None if x is None else x[at] for name, x in tokens.items()}
                loss, metrics = K.ppo_loss(logprobs, entropy=entropy, **part, **terms)
            losses.append(loss.detach())
            figures.append(metrics.tensor)
            for i, gradient in zip(wanted, torch.autograd.grad(loss, leaves) if leaves else (), strict=True):
                if i == 0:
                    dhidden.append(gradient)
                else:
                    sums[i] = gradient.float() if i not in sums else sums[i].add_(gradient)
        none = hidden.new_empty(0)
        gradients = torch.cat(dhidden) if dhidden else none, sums.get(1, none), sums.get(2, none)
        return torch.stack(losses).sum(), _together(torch.stack(figures)), *gradients

    loss, figures = ReadyGradients.apply(hidden, head.weight, head.bias, compute, "cut_ppo_loss")  # type: ignore[no-untyped-call]
    return loss, K.Metrics(PG_METRICS, figures)


class _Leaves(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, labels: Tensor, kept: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    z = head.capped(torch.nn.functional.linear(hidden, weight, bias)).float() / temperature
    logprobs = only_kept(z, kept).log_softmax(-1)
    p = logprobs.exp()
    entropy = -(p * logprobs.masked_fill(p == 0, 0.0)).sum(-1)
    return logprobs.gather(-1, column_of(labels, kept)[:, None])[:, 0], entropy


def _together(figures: Tensor) -> Tensor:
    """(chunks, M) metrics of ppo_loss -> (M,): sums, and maxima where they are."""
    out, at = figures.sum(0), [PG_METRICS.index(name) for name in MAXIMA]
    out[at] = figures[:, at].amax(0)
    return out


def chunk_rows(head: Head) -> int:
    """Rows of a chunk."""
    return max(1, CHUNK_BYTES // (4 * len(head.weight)))
