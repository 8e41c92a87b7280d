"""Every op in plain torch (`impl="ref"`): readable, slow, the same signatures as the fused back-ends. Forward
formulas only: the gradient of a reference is what torch's autograd makes of it, with two rules spelt out. A
probability of zero contributes zero to the entropy and its gradient, also where the logit is -inf. A log-ratio
outside +-20 is clamped, and the clamp passes no gradient.

All arithmetic is fp32 (fp64 inputs stay fp64, for gradcheck)."""

import itertools
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..terms import Divisor, Head, LinearInputs, PolicyTokens, PpoTerms

LOG_RATIO_LIMIT = 20.0


def _f(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def scaled_logits(logits: Tensor, temperature: float, softcap: float) -> Tensor:
    """z: the softcap (0 is none), then the temperature."""
    z = _f(logits)
    if softcap > 0.0:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logprobs(
    logits: Tensor, labels: Tensor, temperature: float, softcap: float, entropy: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    if labels.device.type == "cpu":
        checks.labels_values("token_logprobs", labels, logits.shape[-1], ignore_index)
    keep = labels != ignore_index
    # Rows without a token and rows of -inf are replaced by zeros, so that no NaN is made whose gradient would survive
    # the masks below. (Under a softcap -inf is finite, and such a row is uniform.)
    dead = (logits == -torch.inf).all(-1) if softcap == 0.0 else torch.zeros_like(keep)
    z = scaled_logits(logits.masked_fill((dead | ~keep).unsqueeze(-1), 0.0), temperature, softcap)
    # The maximum comes off first: z[y] - lse would carry the rounding of an offset that all logits share.
    top = z.detach().amax(-1)
    z = z - top.unsqueeze(-1)
    log_sum = torch.logsumexp(z, -1)
    picked = z.gather(-1, labels.where(keep, 0).unsqueeze(-1)).squeeze(-1)
    logprobs = (picked - log_sum).masked_fill(~keep, 0.0)
    logprobs = logprobs.masked_fill(dead & keep, -torch.inf)
    lse = (top + log_sum).masked_fill(dead, -torch.inf)
    if not entropy:
        return logprobs, logprobs.new_empty(0), lse
    p = torch.exp(z - log_sum.unsqueeze(-1))
    mean_z = (p * z.masked_fill(p == 0.0, 0.0)).sum(-1)
    return logprobs, (log_sum - mean_z).masked_fill(~keep | dead, 0.0), lse


def linear_token_logprobs(inputs: LinearInputs, head: Head, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels, bias = inputs
    keep = labels != head.ignore_index  # an ignored row is not read: NaN there is harmless
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits to its dtype
        logits = torch.where(keep.unsqueeze(-1), _f(hidden), 0.0) @ _f(weight).T
    if bias is not None:
        logits = logits + _f(bias)
    return token_logprobs(logits, labels, head.temperature, head.softcap, entropy, head.ignore_index)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    u = _f(logprobs) - _f(ref_logprobs)
    if estimator == "k1":
        return u
    if estimator == "k2":
        return 0.5 * u * u
    if estimator == "abs":
        return u.abs()
    u = u.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(-u) + u


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, cu_seqlens: Tensor, kl_coef: float, estimator: str
) -> Tensor:
    if cu_seqlens.device.type == "cpu":
        checks.cu_seqlens_values("token_rewards", cu_seqlens, logprobs.shape[0])
    rewards = -kl_coef * kl_penalty(logprobs, ref_logprobs, estimator)
    last = cu_seqlens[1:].long() - 1
    return rewards.index_add(0, last, _f(scores))


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    lams: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    r, v = _f(rewards), _f(values)
    keep = torch.ones_like(r, dtype=torch.bool) if mask is None else mask.bool()
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    if cu_seqlens is None:
        rows = [(b, 0, r.shape[1]) for b in range(r.shape[0])]
    else:
        if cu_seqlens.device.type == "cpu":
            checks.cu_seqlens_values("gae", cu_seqlens, r.shape[0])
        ends = cu_seqlens.tolist()
        rows = [(0, a, b) for a, b in itertools.pairwise(ends)]
        r, v, keep = r[None], v[None], keep[None]
    a_out, g_out = (advantages, returns) if cu_seqlens is None else (advantages[None], returns[None])
    for s, (row, start, end) in enumerate(rows):
        step = gamma * (float(lams[s]) if lams is not None else lam)
        next_value = _f(bootstrap[s]) if bootstrap is not None else r.new_zeros(())
        next_advantage = r.new_zeros(())
        for t in range(end - 1, start - 1, -1):
            if keep[row, t]:
                next_advantage = r[row, t] + gamma * next_value - v[row, t] + step * next_advantage
                next_value = v[row, t]
                a_out[row, t] = next_advantage
                g_out[row, t] = next_advantage + next_value
    return advantages, returns


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """(3,) fp64: count, mean, sum of squared deviations from the mean."""
    kept = x.double().flatten() if mask is None else x.double()[mask.bool()]
    count = torch.tensor(float(kept.numel()), dtype=torch.float64, device=x.device)
    mean = kept.sum() / count.clamp(min=1.0)
    return torch.stack([count, mean, ((kept - mean) ** 2).sum()])


def whiten(x: Tensor, mask: Tensor | None, stats: Tensor, shift_mean: bool, eps: float) -> Tensor:
    mean = stats[1]
    scale = torch.rsqrt(stats[2] / stats[0].clamp(min=1.0) + eps)
    y = (x.double() - mean) * scale + (0.0 if shift_mean else mean)
    return (y if mask is None else torch.where(mask.bool(), y, 0.0)).float()


def ppo_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    is_weights: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per token: surrogate loss, ratio, clamped log-ratio, whether the clip decided, whether the dual clip decided."""
    a = _f(advantages)
    log_ratio = (_f(logprobs) - _f(old_logprobs)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = torch.exp(log_ratio)
    plain, clipped = -a * ratio, -a * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    was_clipped = clipped > plain
    loss = torch.where(was_clipped, clipped, plain)
    was_dual = torch.zeros_like(was_clipped)
    if dual_clip > 0.0:
        was_dual = (a < 0) & (loss > -a * dual_clip)
        loss = torch.where(was_dual, -a * dual_clip, loss)
    if is_weights is not None:
        loss = loss * _f(is_weights)
    return loss, ratio, log_ratio, was_clipped, was_dual


def _denominator(mask: Tensor | None, count: int, divisor: Divisor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in the mask, and one over what sums are divided by (0 where there is nothing to divide by)."""
    tokens = like.new_full((), float(count)) if mask is None else mask.bool().sum().to(like.dtype)
    total = tokens if divisor.norm_value == 0.0 else like.new_full((), divisor.norm_value)
    if divisor.normalizer is not None:
        total = divisor.normalizer.to(like.dtype)
    return tokens, torch.where(total > 0, 1.0 / total.clamp(min=torch.finfo(like.dtype).tiny), 0.0)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask.bool(), x, 0.0)


def ppo_loss(logprobs: Tensor, tokens: PolicyTokens, entropy: Tensor | None, terms: PpoTerms) -> tuple[Tensor, Tensor]:
    """Scalar loss and metrics, in the order of ppo_loss.METRICS."""
    mask = tokens.mask
    # A masked token's inputs are made harmless first: where() over its loss alone would keep NaN in its gradient.
    logprobs, old_logprobs, advantages = (_masked(x, mask) for x in (logprobs, tokens.old_logprobs, tokens.advantages))
    is_weights, ref_logprobs, entropy = (
        None if x is None else _masked(x, mask) for x in (tokens.is_weights, tokens.ref_logprobs, entropy)
    )
    pg, ratio, log_ratio, clipped, dual = ppo_terms(
        logprobs, old_logprobs, advantages, is_weights, terms.clip_low, terms.clip_high, terms.dual_clip
    )
    counted, inv = _denominator(mask, pg.numel(), Divisor(terms.normalizer, terms.norm_value), pg)

    def mean(x: Tensor) -> Tensor:
        return _masked(x, mask).sum() * inv

    kl = mean(kl_penalty(logprobs, ref_logprobs, terms.estimator)) if ref_logprobs is not None else pg.new_zeros(())
    ent = mean(_f(entropy)) if entropy is not None else pg.new_zeros(())
    pg_loss = mean(pg)
    loss = pg_loss + terms.kl_coef * kl - terms.ent_coef * ent
    with torch.no_grad():
        ratio_max = _masked(ratio, mask).max() if ratio.numel() else ratio.new_zeros(())
        ratio_gap = _masked((ratio - 1).abs(), mask).max() if ratio.numel() else ratio.new_zeros(())
        approx_kl = mean(torch.expm1(log_ratio) - log_ratio)
        fractions = mean(clipped.to(pg.dtype)), mean(dual.to(pg.dtype))
        figures = [pg_loss, approx_kl, *fractions, mean(ratio), ratio_max, kl, ent, counted, ratio_gap]
        metrics = torch.stack(figures).detach()
    return loss, metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    normalizer: Tensor | None,
    norm_value: float,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Scalar loss and metrics, in the order of value_loss.METRICS. `clip` below 0 is none."""
    if mask is not None:
        values, old_values, returns = (torch.where(mask.bool(), x, 0.0) for x in (values, old_values, returns))
    v, old, target = _f(values), _f(old_values), _f(returns)
    plain = (v - target) ** 2
    clipped = ((old + (v - old).clamp(-clip, clip)) - target) ** 2 if clip >= 0.0 else plain
    # Within `clip` of old, old + (v - old) is v but for a rounding, which must not decide.
    was_clipped = (clipped > plain) & ((v - old).abs() > clip)
    tokens, inv = _denominator(mask, plain.numel(), Divisor(normalizer, norm_value), plain)

    def mean(x: Tensor) -> Tensor:
        return _masked(x, mask).sum() * inv

    loss = 0.5 * mean(torch.where(was_clipped, clipped, plain))
    metrics = torch.stack([loss, mean(was_clipped.to(v.dtype)), mean(v), mean(target), mean(plain), tokens]).detach()
    return loss, metrics


def philox_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Uniforms in (0, 1), fp64 of 24 bits: the first word of Philox4x32-10 with key = seed and counter = (position,
    0)."""
    low32 = 0xFFFFFFFF
    c0, c1 = positions & low32, (positions >> 32) & low32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seeds & low32, (seeds >> 32) & low32

    def product(m: int, c: Tensor) -> tuple[Tensor, Tensor]:
        """High and low words of m * c, in 16-bit halves: int64 would overflow."""
        a, b = m * (c & 0xFFFF), m * (c >> 16)
        middle = (a >> 16) + b
        return (middle >> 16) & low32, ((middle & 0xFFFF) << 16) | (a & 0xFFFF)

    for _ in range(10):
        high0, low0 = product(0xD2511F53, c0)
        high1, low1 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return ((c0 >> 8).double() + 0.5) * 2.0**-24


def sample(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _f(logits)
    bad = torch.isnan(x).any(-1) | (x == torch.inf).any(-1) | (x == -torch.inf).all(-1)
    if x.device.type == "cpu" and bool(bad.any()):
        raise ValueError(
            f"sample: row {int(bad.nonzero()[0])} of logits has NaN, +inf, or nothing above -inf; there is nothing to "
            "draw from"
        )
    plain = torch.log_softmax(x.masked_fill(bad.unsqueeze(-1), 0.0), -1)
    p = plain.exp()
    entropy = -(p * plain.masked_fill(p == 0.0, 0.0)).sum(-1)
    if temperature == 0.0:
        token = x.argmax(-1)
        logprob = torch.zeros_like(entropy)
    else:
        z = x / temperature
        keep = z > -torch.inf
        if 0 < top_k < z.shape[-1]:
            keep &= z >= z.topk(top_k, -1).values[:, -1:]
        weight = torch.where(keep, torch.exp(z - z.amax(-1, keepdim=True)), 0.0).double()
        if top_p < 1.0:
            ordered, order = torch.sort(weight, dim=-1, descending=True, stable=True)
            mass = ordered.cumsum(-1)
            enough = (mass < top_p * weight.sum(-1, keepdim=True)).sum(-1, keepdim=True).clamp(max=z.shape[-1] - 1)
            threshold = z.gather(-1, order.gather(-1, enough))
            weight = torch.where(z >= threshold, weight, 0.0)
        total = weight.sum(-1)
        target = philox_uniform(seeds, positions) * total
        token = (weight.cumsum(-1) <= target.unsqueeze(-1)).sum(-1).clamp(max=z.shape[-1] - 1)
        logprob = (weight.gather(-1, token.unsqueeze(-1)).squeeze(-1) / total).log().to(x.dtype)
    picked = plain.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    nan = torch.nan
    return (
        token.masked_fill(bad, -1),
        logprob.masked_fill(bad, nan),
        picked.masked_fill(bad, nan),
        entropy.masked_fill(bad, nan),
    )


def write_pages(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, tables: Tensor, sequences: Tensor, at: Tensor
) -> None:
    """Put each token's key and value (N, G, D) at position `at` (N,) of its sequence."""
    page = key_pages.shape[-1]
    where, inside = tables[sequences.long(), at.long() // page].long(), at.long() % page
    key_pages[where, :, :, inside] = key
    value_pages[where, :, inside] = value


def read_pages(key_pages: Tensor, value_pages: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (S, G, L, D) and values (S, G, L, Dv) of whole table rows, in the order of positions."""
    keys = key_pages[tables.long()].permute(0, 2, 1, 4, 3).flatten(2, 3)  # (S, blocks, G, D, page) before
    return keys, value_pages[tables.long()].transpose(1, 2).flatten(2, 3)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    write_pages(key, value, key_pages, value_pages, tables, sequences, positions)
    keys, values = read_pages(key_pages, value_pages, tables[sequences.long()])
    tokens, heads, dim = query.shape
    grouped = _f(query).view(tokens, keys.shape[1], -1, dim)
    scores = scale * grouped @ _f(keys).transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(keys.shape[2], device=query.device)
    seen = at <= positions[:, None]
    if window:
        seen &= at > positions[:, None] - window
    weights = torch.softmax(scores.masked_fill(~seen[:, None, None], -torch.inf), -1)
    # A value that is not attended to may be anything, NaN included.
    values = _f(values).masked_fill(~seen[:, None, :, None], 0.0)
    return (weights @ values).reshape(tokens, heads, -1).to(query.dtype)


def write_row_pages(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, tables: Tensor, sequences: Tensor, at: Tensor
) -> None:
    """`write_pages` where keys lie as values do: (pages, G, P, D)."""
    write_pages(key, value, key_pages.transpose(2, 3), value_pages, tables, sequences, at)


def paged_decode(
    query: Tensor, key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, *rest: Any
) -> Tensor:
    """`paged_attention` over such pages."""
    return paged_attention(query, key, value, key_pages.transpose(2, 3), value_pages, *rest)


def gated_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    act = silu(_f(gate)) if activation == "silu" else gelu(_f(gate), approximate="tanh")
    return (act * _f(up)).to(gate.dtype)
