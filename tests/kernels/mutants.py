"""Wrong kernels. A mutant wraps an op and does one thing wrong, as a real kernel might; the checking functions of
verify.py must catch each on at least one of the shared cases. What would make it easy is taken out first: a mutant
that ignores a mask finds no NaN behind it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ppomax_kernels import Metrics
from torch import Tensor

Run = Callable[..., Any]
Mutant = Callable[..., Any]  # (run, *args, **kwargs) of the op


def each(out: Any, change: Callable[[Tensor], Tensor], only: int | None = None) -> Any:
    """`change` on every tensor of an op's output, or on the one of that index."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, Metrics):
        return Metrics(out.names, change(out.tensor))
    return tuple(each(x, change) if only in (None, i) else x for i, x in enumerate(out))


def a_percent(x: Tensor) -> Tensor:
    """One element off by 1 %: the one of median size among those that are not 0."""
    size = x.detach().abs().flatten()
    at = ((size > 0) & torch.isfinite(size)).nonzero().flatten()
    if not at.numel():
        return x
    factor = torch.ones_like(size)
    factor[at[size[at].argsort()[len(at) // 2]]] = 1.01
    return x * factor.view(x.shape).to(x.dtype)


def nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x) * x.nan_to_num(0.0, 0.0, 0.0)


def shifted(x: Tensor) -> Tensor:
    return x.roll(1, -1) if x.ndim else x


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return ctx.change(dx), None


def on_output(change: Callable[[Tensor], Tensor], only: int | None = None) -> Mutant:
    return lambda run, *args, **kwargs: each(run(*args, **kwargs), change, only)


def on_gradient(change: Callable[[Tensor], Tensor], name: str | int = 0) -> Mutant:
    """The gradient of one input, given by position or name."""

    def mutant(run: Run, *args: Any, **kwargs: Any) -> Any:
        if isinstance(name, str):
            if kwargs.get(name) is not None and kwargs[name].requires_grad:
                kwargs[name] = _WrongGradient.apply(kwargs[name], change)
        elif args[name].requires_grad:
            args = (*args[:name], _WrongGradient.apply(args[name], change), *args[name + 1 :])
        return run(*args, **kwargs)

    return mutant


def forgets(position: int | None = None, /, **replaced: Any) -> Mutant:
    """An argument ignored: the one at `position` becomes None, named ones the given value, and NaN an ordinary
    number."""

    def mutant(run: Run, *args: Any, **kwargs: Any) -> Any:
        args = tuple(harmless(a) for a in args)
        kwargs = {k: harmless(a) for k, a in kwargs.items()}
        if position is not None:
            args = (*args[:position], None, *args[position + 1 :])
        return run(*args, **{**kwargs, **replaced})

    return mutant


def harmless(x: Any) -> Any:
    return torch.where(torch.isnan(x), 0.5, x) if isinstance(x, Tensor) and x.is_floating_point() else x


def shifts_input(position: int) -> Mutant:
    return lambda run, *args, **kw: run(*args[:position], shifted(args[position]), *args[position + 1 :], **kw)


def skips_not(run: Run, logits: Tensor, labels: Tensor, **kw: Any) -> Any:
    """Rows to skip are worked on like others."""
    return run(harmless(logits), labels.where(labels != kw["ignore_index"], 0), **kw)


def open_tail(run: Run, logits: Tensor, labels: Tensor, **kw: Any) -> Any:
    """V rounded up to a tile of 128, with 0 in the columns that do not exist."""
    return run(torch.nn.functional.pad(logits, (0, -logits.shape[-1] % 128)), labels, **kw)


def closed_tail(run: Run, logits: Tensor, labels: Tensor, **kw: Any) -> Any:
    """The last columns that do not fill a tile are not read."""
    whole = logits.shape[-1] // 128 * 128
    end = whole or logits.shape[-1]
    return run(logits[..., :end], labels.where((labels < end) | (labels < 0), 0), **kw)


def entropy_without_gradient(run: Run, *args: Any, **kw: Any) -> Any:
    out = run(*args, **kw)
    return (out[0], _WrongGradient.apply(out[1], nothing)) if isinstance(out, tuple) else out


def one_long_sequence(
    run: Run, rewards: Tensor, values: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, **kw: Any
) -> Any:
    """The last token of a sequence sees the next."""
    if cu_seqlens is None or len(cu_seqlens) < 2 or isinstance(kw["lam"], Tensor):
        return run(rewards, values, cu_seqlens, mask, **kw)
    boot = kw.pop("bootstrap")
    return run(rewards, values, cu_seqlens[[0, -1]], mask, bootstrap=None if boot is None else boot[-1:], **kw)


def masked_as_zero(
    run: Run, rewards: Tensor, values: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, **kw: Any
) -> Any:
    """No carry-over: a masked step counts as a step of reward and value 0."""
    if mask is None:
        return run(rewards, values, cu_seqlens, mask, **kw)
    keep = mask.bool()
    out = run(rewards.where(keep, 0), values.where(keep, 0), cu_seqlens, None, **kw)
    return tuple(x.where(keep, 0) for x in out)


def first_lam(run: Run, *args: Any, **kw: Any) -> Any:
    lam = kw.pop("lam")
    return run(*args, lam=lam[:1].expand(lam.shape).contiguous() if isinstance(lam, Tensor) else lam, **kw)


def score_at_the_start(run: Run, scores: Tensor, logprobs: Tensor, ref: Tensor, ends: Tensor, **kw: Any) -> Tensor:
    r = run(torch.zeros_like(scores), logprobs, ref, ends, **kw)
    return r.index_add(0, ends[:-1].long(), scores.float())


def sample_variance(run: Run, x: Tensor, mask: Tensor | None, **kw: Any) -> Tensor:
    """Divided by n - 1."""
    n = x.numel() if mask is None else int(mask.sum())
    y = run(x, mask, **kw)
    return y * ((n - 1) / n) ** 0.5 if n > 1 and kw["shift_mean"] else y


def no_clip_gradient(run: Run, logprobs: Tensor, *rest: Any, **kw: Any) -> Any:
    """The loss is clipped, its gradient is not."""
    loss, metrics = run(logprobs, *rest, **kw)
    free, _ = run(logprobs, *rest, **{**kw, "clip_high": 1e9, "clip_low": 0.999, "dual_clip": None})
    return loss.detach() + free - free.detach(), metrics


def skipped_linear(run: Run, hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any, **kw: Any) -> Any:
    """Rows whose label is ignore_index are worked on like others."""
    rest = tuple(harmless(x) for x in rest)
    return run(harmless(hidden), weight, labels.where(labels != kw["ignore_index"], 0), *rest, **{**kw, "kept": None})


def open_tail_linear(run: Run, hidden: Tensor, weight: Tensor, *rest: Any, **kw: Any) -> Any:
    extra = -weight.shape[0] % 128
    bias = None if kw["bias"] is None else torch.nn.functional.pad(kw["bias"], (0, extra))
    return run(hidden, torch.nn.functional.pad(weight, (0, 0, 0, extra)), *rest, **{**kw, "bias": bias})


def mask_ignored_linear(run: Run, *args: Any, **kw: Any) -> Any:
    return run(*(harmless(x) for x in args[:5]), None, **{**kw, "kept": None})


def last_chunk_lost(run: Run, hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any, **kw: Any) -> Any:
    """The rows that do not fill a chunk are skipped."""
    chunk = kw["chunk_tokens"] or len(labels)
    past = torch.arange(len(labels)) >= len(labels) // chunk * chunk
    return run(hidden, weight, labels.masked_fill(past, kw["ignore_index"]), *rest, **{**kw, "kept": None})


def redraws(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Mutant:
    return lambda run, *args, **kw: run(*change(*args), **kw)


def next_token(run: Run, logits: Tensor, *args: Any, **kw: Any) -> Any:
    token, *rest = run(logits, *args, **kw)
    return ((token + 1) % logits.shape[1], *rest)


OUTPUT: dict[str, Mutant] = {
    "zeros": on_output(nothing),
    "a percent off": on_output(a_percent),
    "bfloat16 inside": on_output(lambda x: x + (x.detach().bfloat16().float() - x.detach())),
}
GRADIENT: dict[str, Mutant] = {
    "gradient zero": on_gradient(nothing),
    "gradient a percent off": on_gradient(a_percent),
    "gradient shifted": on_gradient(shifted),
    "gradient doubled": on_gradient(lambda d: 2 * d),
}
SECOND: dict[str, Mutant] = {
    "second output zero": on_output(nothing, 1),
    "second output a percent off": on_output(a_percent, 1),
}
LOSS: dict[str, Mutant] = {
    "mask ignored": forgets(3),
    "time shifted (old)": shifts_input(1),
    "time shifted (target)": shifts_input(2),
    "normalizer ignored": forgets(normalizer=None),
}
ROWS: dict[str, Mutant] = {
    "temperature ignored": forgets(temperature=1.0),
    "softcap ignored": forgets(softcap=None),
    "entropy without gradient": entropy_without_gradient,
}
MUTANTS: dict[str, dict[str, Mutant]] = {
    "token_logprobs": {
        **OUTPUT,
        **GRADIENT,
        **SECOND,
        **ROWS,
        "mask ignored": skips_not,
        "time shifted": shifts_input(1),
        "tail unmasked": open_tail,
        "tail not read": closed_tail,
    },
    "kl_penalty": {
        **OUTPUT,
        **GRADIENT,
        "time shifted": shifts_input(1),
        "second gradient lost": on_gradient(nothing, 1),
        "estimator ignored": forgets(estimator="k1"),
        "k3 for all": forgets(estimator="k3"),
    },
    "token_rewards": {
        **OUTPUT,
        "time shifted": on_output(shifted),
        "score at the start": score_at_the_start,
        "no penalty": forgets(kl_coef=0.0),
        "estimator ignored": forgets(estimator="k1"),
    },
    "gae": {
        **OUTPUT,
        **SECOND,
        "mask ignored": forgets(3),
        "masked as zero": masked_as_zero,
        "time shifted": on_output(shifted),
        "values shifted": shifts_input(1),
        "borders ignored": one_long_sequence,
        "bootstrap ignored": forgets(bootstrap=None),
        "one lam for all": first_lam,
        "gamma ignored": forgets(gamma=1.0),
    },
    "whiten": {
        **OUTPUT,
        "mask ignored": forgets(1),
        "time shifted": on_output(shifted),
        "sample variance": sample_variance,
        "mean not kept": forgets(shift_mean=True),
        "mean kept": forgets(shift_mean=False),
        "eps ignored": forgets(eps=1e-8),
    },
    "ppo_loss": {
        **OUTPUT,
        **GRADIENT,
        **SECOND,
        **LOSS,
        "clip_high ignored": forgets(clip_high=1e9),
        "clip_low ignored": forgets(clip_low=0.999),
        "clip_high is clip_low": forgets(clip_high=0.2),
        "dual clip ignored": forgets(dual_clip=None),
        "weights ignored": forgets(is_weights=None),
        "kl ignored": forgets(kl_coef=0.0),
        "estimator ignored": forgets(estimator="k3"),
        "entropy gradient lost": on_gradient(nothing, "entropy"),
        "gradient through the clip": no_clip_gradient,
    },
    "value_loss": {
        **OUTPUT,
        **GRADIENT,
        **SECOND,
        **LOSS,
        "clip ignored": forgets(clip=None),
        "clip fixed": forgets(clip=0.2),
        "half missing": on_output(lambda x: 2 * x, 0),
    },
}


LINEAR: dict[str, Mutant] = {
    **OUTPUT,
    **GRADIENT,
    **SECOND,
    "temperature ignored": forgets(temperature=1.0),
    "softcap ignored": forgets(softcap=None),
    "bias ignored": forgets(bias=None),
    "mask ignored (labels)": skipped_linear,
    "tail unmasked": open_tail_linear,
    "time shifted": shifts_input(2),
    "last chunk lost": last_chunk_lost,
    "weight gradient zero": on_gradient(nothing, 1),
    "weight gradient a percent off": on_gradient(a_percent, 1),
    "bias gradient zero": on_gradient(nothing, "bias"),
}
MUTANTS["linear_token_logprobs"] = {**LINEAR, "entropy without gradient": entropy_without_gradient}
MUTANTS["linear_nll"] = {**LINEAR, "normalizer ignored": forgets(normalizer=None)}
MUTANTS["linear_ppo_loss"] = {
    **LINEAR,
    "mask ignored": mask_ignored_linear,
    "time shifted (old)": shifts_input(3),
    "time shifted (advantages)": shifts_input(4),
    "normalizer ignored": forgets(normalizer=None),
    "dual clip ignored": forgets(dual_clip=None),
    "weights ignored": forgets(is_weights=None),
    "kl ignored": forgets(kl_coef=0.0),
    "estimator ignored": forgets(estimator="k3"),
    "entropy bonus ignored": forgets(ent_coef=0.0),
    "clip_high is clip_low": forgets(clip_high=0.2),
}
MUTANTS["sample"] = {
    "zeros": on_output(lambda x: torch.zeros_like(x), 0),
    "logprob zero": on_output(nothing, 1),
    "logprob a percent off": on_output(a_percent, 1),
    "plain logprob a percent off": on_output(a_percent, 2),
    "entropy a percent off": on_output(a_percent, 3),
    "next token": next_token,
    "temperature ignored": forgets(temperature=1.0),
    "top_k ignored": forgets(top_k=0),
    "top_p ignored": forgets(top_p=1.0),
    "seed ignored": redraws(lambda z, s, p: (z, torch.zeros_like(s), p)),
    "position ignored": redraws(lambda z, s, p: (z, s, torch.zeros_like(p))),
    "high word of the seed ignored": redraws(lambda z, s, p: (z, s & 0xFFFFFFFF, p)),
    "high word of the position ignored": redraws(lambda z, s, p: (z, s, p & 0xFFFFFFFF)),
    "time shifted": shifts_input(0),
    "last column not drawn": redraws(lambda z, s, p: (z[:, : z.shape[1] // 128 * 128 or None], s, p)),
}


def mutate(mutant: Mutant, run: Run) -> Run:
    return partial(mutant, run)
