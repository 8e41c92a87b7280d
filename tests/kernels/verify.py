"""One function an op: draws a case's tensors, runs `run` (the public op, bound to a back-end, or a mutant of it)
forward and backward, and holds every output and every gradient against the oracle. The tests of the ops and the
mutants call the same functions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import oracle, plain
from .cases import IGNORE, Logits, Packed, Spread, Tokens, dtype_of
from .contract import all_zero, f64, hold

Run = Callable[..., Any]


def leaf(x: Tensor) -> Tensor:
    """The same memory as a leaf that wants a gradient (strides kept)."""
    return x.detach().requires_grad_()


def gradients(outputs: list[Tensor], upstream: list[Tensor | None], inputs: list[Tensor]) -> list[Tensor]:
    """d inputs; an output whose upstream is None is not used."""
    used = [(o, u) for o, u in zip(outputs, upstream, strict=True) if u is not None]
    got = torch.autograd.grad([o for o, _ in used], inputs, [u for _, u in used], allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for d, x in zip(got, inputs, strict=True)]


def token_logprobs(run: Run, case: Logits, device: str = "cpu") -> None:
    logits, labels, dlp, dent = case.draw(device)
    options = dict(temperature=case.temperature, softcap=case.softcap, ignore_index=IGNORE)
    z, y = f64(logits), labels.cpu().numpy()
    truth = oracle.token_logprobs_truth(z, y, case.temperature, case.softcap, IGNORE)
    mine, theirs = leaf(logits), leaf(logits)
    got, yard = run(mine, labels, return_entropy=True, **options), plain.token_logprobs(theirs, labels, **options)
    for what, *three in zip(("logprobs", "entropy"), got, truth, yard, strict=True):
        hold(f"{case}: {what}", *three)
    hold(f"{case}: logprobs alone", run(logits, labels, **options), truth[0], yard[0])
    zero = np.zeros(y.shape)
    up = [zero if u is None else f64(u) for u in (dlp, dent)]
    dlogits = oracle.token_logprobs_gradient(z, y, case.temperature, case.softcap, IGNORE, *up)
    by_lse = list(plain.token_logprobs_by_lse(theirs, labels, **options))
    (d,) = gradients(list(got), [dlp, dent], [mine])
    d_yard = [gradients(list(way), [dlp, dent], [theirs])[0] for way in (by_lse, yard)]
    hold(f"{case}: dlogits", d, dlogits, *d_yard, dtype=dtype_of(case.dtype))
    all_zero(f"{case}: dlogits of skipped rows", d[labels == IGNORE])


def kl_penalty(run: Run, case: Tokens, device: str = "cpu") -> None:
    x = case.draw(device)
    pairs = [[leaf(x["first"]), leaf(x["reference"])] for _ in range(2)]
    got, yard = run(*pairs[0], estimator=case.estimator), plain.kl_penalty(*pairs[1], case.estimator)
    value, slope = oracle.kl_penalty_truth(f64(x["first"]), f64(x["reference"]), case.estimator)
    hold(f"{case}: kl", got, value, yard)
    d, d_yard = gradients([got], [x["upstream"]], pairs[0]), gradients([yard], [x["upstream"]], pairs[1])
    for what, sign, *two in zip(("dlogprobs", "dref_logprobs"), (1.0, -1.0), d, d_yard, strict=True):
        hold(f"{case}: {what}", two[0], sign * slope * f64(x["upstream"]), two[1], dtype=dtype_of(case.dtype))


def token_rewards(run: Run, lengths: tuple[int, ...], case: Tokens, device: str = "cpu") -> None:
    x = case.draw(device)
    scores = (
        (3.0 * torch.randn(len(lengths), generator=torch.Generator().manual_seed(9)))
        .to(dtype_of(case.other))
        .to(device)
    )
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    args = (scores, x["first"], x["reference"], ends)
    truth = oracle.token_rewards_truth(*map(f64, args[:3]), lengths, case.kl_coef, case.estimator)
    hold(
        f"{lengths} {case}",
        run(*args, kl_coef=case.kl_coef, estimator=case.estimator),
        truth,
        plain.token_rewards(*args, case.kl_coef, case.estimator),
    )


def gae(run: Run, case: Packed, device: str = "cpu") -> None:
    x = case.draw(device)
    lam = case.lam if x["lams"] is None else x["lams"]
    got = run(
        x["rewards"], x["values"], x["cu_seqlens"], x["mask"], gamma=case.gamma, lam=lam, bootstrap=x["bootstrap"]
    )
    r, v = x["rewards"], x["values"]
    count, longest = len(case.lengths), max(case.lengths, default=0)
    lengths = [longest] * count if case.padded else list(case.lengths)
    lams = [case.lam] * count if x["lams"] is None else f64(x["lams"])
    after = np.zeros(count) if x["bootstrap"] is None else f64(x["bootstrap"])
    mask = None if x["mask"] is None else x["mask"].cpu().numpy().reshape(-1)
    truth = oracle.gae_truth(f64(r).reshape(-1), f64(v).reshape(-1), lengths, mask, case.gamma, lams, after)
    yard = _plain_gae(case, x, lam)
    for what, result, t, y in zip(("advantages", "returns"), got, truth, yard, strict=True):
        hold(f"{case}: {what}", result, t.reshape(tuple(r.shape)), y)


def _plain_gae(case: Packed, x: dict[str, Tensor | None], lam: Any) -> tuple[Tensor, Tensor]:
    """The yardstick takes padded rows: packed ones are padded for it, and its results packed again."""
    r, v, m = x["rewards"], x["values"], x["mask"]
    assert r is not None
    assert v is not None
    count, longest = len(case.lengths), max(case.lengths, default=0)
    inside = torch.arange(longest)[None] < torch.tensor(case.lengths, dtype=torch.int64)[:, None]
    where = torch.ones(count, longest, dtype=torch.bool) if case.padded else inside

    def pad(t: Tensor) -> Tensor:
        out = torch.zeros(count, longest)
        out[where] = t.cpu().float().reshape(-1)
        return out

    keep = where if m is None else pad(m) > 0
    boot = torch.zeros(count) if x["bootstrap"] is None else x["bootstrap"].cpu()
    if not longest:
        return torch.zeros(r.shape), torch.zeros(r.shape)
    a, g = plain.gae(pad(r), pad(v), keep, case.gamma, lam.cpu() if isinstance(lam, Tensor) else lam, boot)
    return a[where].reshape(r.shape), g[where].reshape(r.shape)


def whiten(run: Run, case: Spread, device: str = "cpu") -> None:
    x, mask = case.draw(device)
    m = None if mask is None else mask.cpu().numpy()
    options = dict(shift_mean=case.shift_mean, eps=case.eps)
    hold(
        f"{case}", run(x, mask, **options), oracle.whiten_truth(f64(x), m, **options), plain.whiten(x, mask, **options)
    )


def ppo_loss(run: Run, case: Tokens, device: str = "cpu") -> None:
    x = case.draw(device)
    normalizer, value = case.normalizer_for(device)
    settings = dict(
        clip_low=case.clip_low,
        clip_high=case.clip_high,
        dual_clip=case.dual_clip,
        kl_coef=case.kl_coef,
        estimator=case.estimator,
        ent_coef=case.ent_coef,
    )
    extra = {
        "is_weights": x["weights"] if case.weighted else None,
        "ref_logprobs": x["reference"] if case.kl_coef else None,
        "entropy": x["entropy"] if case.ent_coef else None,
    }
    sides = []
    for op, norm in ((run, normalizer), (plain.ppo_loss, value)):
        logp = leaf(x["first"])
        entropy = None if extra["entropy"] is None else leaf(extra["entropy"])
        loss, metrics = op(
            logp, x["old"], x["advantages"], x["mask"], **settings, **{**extra, "entropy": entropy}, normalizer=norm
        )
        wanted = [logp] if entropy is None else [logp, entropy]
        sides.append((loss, metrics, gradients([loss], [torch.full_like(loss, 1.5)], wanted)))
    arrays = {k: None if t is None else f64(t) for k, t in extra.items()}
    keep = None if x["mask"] is None else x["mask"].cpu().numpy()
    loss, metrics, dlogprobs, dentropy = oracle.ppo_loss_truth(
        f64(x["first"]), f64(x["old"]), f64(x["advantages"]), keep, **settings, **arrays, normalizer=value
    )
    hold_loss(str(case), *sides[0][:2], loss, metrics, *sides[1][:2])
    for what, truth, got, yard in zip(
        ("dlogprobs", "dentropy"), (dlogprobs, dentropy), sides[0][2], sides[1][2], strict=False
    ):
        hold(f"{case}: {what}", got, 1.5 * truth, yard, dtype=dtype_of(case.dtype))
        if keep is not None:
            all_zero(f"{case}: {what} of masked tokens", got[x["mask"] == 0])


def value_loss(run: Run, case: Tokens, device: str = "cpu") -> None:
    x = case.draw(device)
    normalizer, value = case.normalizer_for(device)
    sides = []
    for op, norm in ((run, normalizer), (plain.value_loss, value)):
        values = leaf(x["first"])
        loss, metrics = op(values, x["old"], x["returns"], x["mask"], clip=case.clip, normalizer=norm)
        sides.append((loss, metrics, gradients([loss], [torch.full_like(loss, 1.5)], [values])))
    keep = None if x["mask"] is None else x["mask"].cpu().numpy()
    loss, metrics, dvalues = oracle.value_loss_truth(
        f64(x["first"]), f64(x["old"]), f64(x["returns"]), keep, clip=case.clip, normalizer=value
    )
    hold_loss(str(case), *sides[0][:2], loss, metrics, *sides[1][:2])
    hold(f"{case}: dvalues", sides[0][2][0], 1.5 * dvalues, sides[1][2][0], dtype=dtype_of(case.dtype))
    if keep is not None:
        all_zero(f"{case}: dvalues of masked tokens", sides[0][2][0][x["mask"] == 0])


def hold_loss(
    case: str,
    loss: Tensor,
    metrics: Any,
    loss_truth: float,
    truth: dict[str, float],
    loss_yard: Tensor,
    yard: dict[str, Tensor],
) -> None:
    hold(f"{case}: loss", loss, np.float64(loss_truth), loss_yard)
    assert set(metrics) == set(truth), f"{case}: metrics {sorted(metrics)}, wanted {sorted(truth)}"
    for name, value in truth.items():
        hold(f"{case}: {name}", metrics[name], np.float64(value), yard[name])
        assert not metrics[name].requires_grad, f"{case}: the metric {name} carries a gradient"
