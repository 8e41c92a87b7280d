"""What the ops mean, in numpy and float64: the definitions, in another shape than any implementation and sharing no
code with one. GAE is the explicit double sum, a masked step is cut out before, a clipped loss is told case by case,
gradients are closed forms. Slow and plain."""

from collections.abc import Sequence

import numpy as np

Array = np.ndarray
LIMIT = 20.0  # log-ratios are clamped to +-20


def softened(logits: Array, temperature: float, softcap: float | None) -> tuple[Array, Array]:
    """z and dz/dlogits."""
    if softcap is None:
        return logits / temperature, np.full_like(logits, 1.0 / temperature)
    t = np.tanh(logits / softcap)
    return softcap * t / temperature, (1.0 - t * t) / temperature


def log_softmax(z: Array) -> Array:
    """Rows of nothing but -inf give -inf."""
    top = z.max(-1, keepdims=True)
    shifted = z - np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted - np.where(np.isfinite(total), total, 0.0)


def entropy_of(logp: Array) -> Array:
    p = np.exp(logp)
    return -(p * np.where(p > 0, logp, 0.0)).sum(-1)


def token_logprobs_truth(
    logits: Array, labels: Array, temperature: float, softcap: float | None, ignore_index: int
) -> tuple[Array, Array]:
    keep = labels != ignore_index
    logp = log_softmax(softened(np.where(keep[..., None], logits, 0.0), temperature, softcap)[0])
    picked = np.take_along_axis(logp, np.where(keep, labels, 0)[..., None], -1)[..., 0]
    return np.where(keep, picked, 0.0), np.where(keep, entropy_of(logp), 0.0)


def token_logprobs_gradient(
    logits: Array,
    labels: Array,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    dlogprobs: Array,
    dentropy: Array,
) -> Array:
    """d logp_y / dz_v = 1[v = y] - p_v ;  d H / dz_v = -p_v (log p_v + H)."""
    keep = labels != ignore_index
    z, slope = softened(np.where(keep[..., None], logits, 0.0), temperature, softcap)
    logp = log_softmax(z)
    p = np.exp(logp)
    one_hot = np.arange(logits.shape[-1]) == labels[..., None]
    surprise = np.where(p > 0, logp, 0.0) + entropy_of(logp)[..., None]
    dz = dlogprobs[..., None] * (one_hot - p) - dentropy[..., None] * p * surprise
    dead = np.isneginf(z).all(-1)
    return np.where((keep & ~dead)[..., None], dz * slope, 0.0)


def kl_penalty_truth(logprobs: Array, ref_logprobs: Array, estimator: str) -> tuple[Array, Array]:
    """The estimate and its derivative with respect to logprobs."""
    u = logprobs - ref_logprobs
    c, inside = np.clip(u, -LIMIT, LIMIT), np.abs(u) < LIMIT
    value = {"k1": u, "k2": u**2 / 2, "abs": np.abs(u), "k3": np.expm1(-c) + c}[estimator]
    slope = {"k1": np.ones_like(u), "k2": u, "abs": np.sign(u), "k3": np.where(inside, -np.expm1(-c), 0.0)}[estimator]
    return value, slope


def token_rewards_truth(
    scores: Array, logprobs: Array, ref_logprobs: Array, lengths: Sequence[int], kl_coef: float, estimator: str
) -> Array:
    rewards, at = [], 0
    for score, length in zip(scores, lengths, strict=True):
        span = -kl_coef * kl_penalty_truth(logprobs[at : at + length], ref_logprobs[at : at + length], estimator)[0]
        rewards += [*span[:-1], span[-1] + score]
        at += length
    return np.array(rewards)


def advantages_of(rewards: Array, values: Array, gamma: float, lam: float, bootstrap: float) -> Array:
    """A_t = sum over l of (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}): every term of it that is not below
    1e-30."""
    delta = rewards + gamma * np.append(values[1:], bootstrap) - values
    decay, n = gamma * lam, len(rewards)
    reach = n if decay == 1.0 else 1 if decay == 0.0 else min(n, 2 + int(np.log(1e-30) / np.log(decay)))
    total = np.zeros(n)
    for ahead in range(reach):
        total[: n - ahead] += decay**ahead * delta[ahead:]
    return total


def gae_truth(
    rewards: Array,
    values: Array,
    lengths: Sequence[int],
    mask: Array | None,
    gamma: float,
    lams: Sequence[float],
    bootstrap: Sequence[float],
) -> tuple[Array, Array]:
    """On packed tokens; padded ones are B sequences of length T. A masked step does not exist for the others, and
    gives 0."""
    advantages, returns, at = np.zeros(len(rewards)), np.zeros(len(rewards)), 0
    for length, lam, after in zip(lengths, lams, bootstrap, strict=True):
        here = np.arange(at, at + length)
        here = here if mask is None else here[mask[here] != 0]
        if len(here):
            advantages[here] = advantages_of(rewards[here], values[here], gamma, lam, after)
            returns[here] = advantages[here] + values[here]
        at += length
    return advantages, returns


def whiten_truth(x: Array, mask: Array | None, shift_mean: bool, eps: float, of: Array | None = None) -> Array:
    """`of`: the kept values that mean and variance are taken from, if not x's own (those of every rank)."""
    keep = np.ones(x.shape, bool) if mask is None else mask != 0
    kept = x[keep] if of is None else of
    if not kept.size:
        return np.zeros(x.shape)
    y = (x - kept.mean()) / np.sqrt(kept.var() + eps) + (0.0 if shift_mean else kept.mean())
    return np.where(keep, y, 0.0)


def ppo_loss_truth(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array | None,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    normalizer: float | None,
    is_weights: Array | None,
    ref_logprobs: Array | None,
    kl_coef: float,
    estimator: str,
    entropy: Array | None,
    ent_coef: float,
) -> tuple[float, dict[str, float], Array, Array]:
    """Loss, metrics, d loss / d logprobs, d loss / d entropy."""
    keep = np.ones(logprobs.shape, bool) if mask is None else mask != 0
    logp, old, a = logprobs[keep], old_logprobs[keep], advantages[keep]
    weight = np.ones_like(a) if is_weights is None else is_weights[keep]
    inside = np.abs(logp - old) < LIMIT
    log_w = np.clip(logp - old, -LIMIT, LIMIT)
    w = np.exp(log_w)
    over, under = (a > 0) & (w > 1 + clip_high), (a < 0) & (w < 1 - clip_low)
    clipped = over | under
    used = np.select([over, under], [1 + clip_high, 1 - clip_low], w)
    dual = np.zeros_like(over) if dual_clip is None else (a < 0) & (used > dual_clip)
    used = np.where(dual, dual_clip or 0.0, used)
    gradient = np.where(clipped | dual | ~inside, 0.0, -a * w * weight)
    share = _share(normalizer, keep.sum())
    kl, dkl = (np.zeros_like(a),) * 2 if ref_logprobs is None else kl_penalty_truth(logp, ref_logprobs[keep], estimator)
    ent = np.zeros_like(a) if entropy is None else entropy[keep]
    metrics = {
        "pg_loss": (-a * used * weight).sum() * share,
        "approx_kl": (np.expm1(log_w) - log_w).sum() * share,
        "clipfrac": clipped.sum() * share,
        "dual_clipfrac": dual.sum() * share,
        "ratio_mean": w.sum() * share,
        "ratio_max": w.max(initial=0.0),
        "kl": kl.sum() * share,
        "entropy": ent.sum() * share,
        "tokens": float(keep.sum()),
        "ratio_gap": np.abs(w - 1).max(initial=0.0),
    }
    dlogprobs, dentropy = np.zeros(logprobs.shape), np.zeros(logprobs.shape)
    dlogprobs[keep] = (gradient + kl_coef * dkl) * share
    dentropy[keep] = -ent_coef * share
    return metrics["pg_loss"] + kl_coef * metrics["kl"] - ent_coef * metrics["entropy"], metrics, dlogprobs, dentropy


def value_loss_truth(
    values: Array,
    old_values: Array,
    returns: Array,
    mask: Array | None,
    *,
    clip: float | None,
    normalizer: float | None,
) -> tuple[float, dict[str, float], Array]:
    """Loss, metrics, d loss / d values."""
    keep = np.ones(values.shape, bool) if mask is None else mask != 0
    v, old, target = values[keep], old_values[keep], returns[keep]
    # Within `clip` of the old value the clipped value is the value itself, without a rounding in between.
    moved = np.zeros(v.shape, bool) if clip is None else np.abs(v - old) > clip
    bounded = np.where(moved, old + np.sign(v - old) * (clip or 0.0), v)
    clipped = moved & ((bounded - target) ** 2 > (v - target) ** 2)
    share = _share(normalizer, keep.sum())
    loss = 0.5 * (np.where(clipped, bounded, v) - target) ** 2
    metrics = {
        "v_loss": loss.sum() * share,
        "clipfrac": clipped.sum() * share,
        "value_mean": v.sum() * share,
        "return_mean": target.sum() * share,
        "squared_error": ((v - target) ** 2).sum() * share,
        "tokens": float(keep.sum()),
    }
    dvalues = np.zeros(values.shape)
    dvalues[keep] = np.where(clipped, 0.0, v - target) * share
    return metrics["v_loss"], metrics, dvalues


def _share(normalizer: float | None, tokens: int) -> float:
    total = float(tokens) if normalizer is None else normalizer
    return 1.0 / total if total > 0 else 0.0
