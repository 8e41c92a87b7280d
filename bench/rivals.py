"""What others do: plain torch as it stands in trainers, in this project's own words. Each works in any float dtype,
so that the same text in float64 is the truth that results are checked against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def wide(*tensors: Tensor) -> list[Tensor]:
    """Half precision as float32: losses summed in it are off by percents."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def logprobs_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log_softmax, gather, entropy; float32 arithmetic on half-precision logits, as a careful trainer has it."""
    logp = F.log_softmax(*wide(logits), -1)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The clipped loss with the figures that trainers log beside it."""
    logprobs, old, advantages = wide(logprobs, old, advantages)
    m = mask.to(logprobs.dtype)
    log_ratio = (logprobs - old).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    tokens = m.sum()
    loss = (torch.maximum(plain, clipped) * m).sum() / tokens
    with torch.no_grad():
        figures = (
            ((ratio - 1.0 - log_ratio) * m).sum() / tokens,
            ((clipped > plain) * m).sum() / tokens,
            (ratio * m).sum() / tokens,
            (ratio * m).max(),
        )
    assert len(figures) == 4
    return loss


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    values, old, returns = wide(values, old, returns)
    m = mask.to(values.dtype)
    near = torch.maximum(torch.minimum(values, old + 0.2), old - 0.2)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    tokens = m.sum()
    with torch.no_grad():
        figures = ((clipped > plain) * m).sum() / tokens, (values * m).sum() / tokens, (returns * m).sum() / tokens
    assert len(figures) == 3
    return 0.5 * (torch.maximum(plain, clipped) * m).sum() / tokens


def kl_k3(logprobs: Tensor, ref: Tensor) -> Tensor:
    u = (logprobs - ref).clamp(-20.0, 20.0)
    return torch.exp(-u) - 1.0 + u


def token_rewards(scores: Tensor, logprobs: Tensor, ref: Tensor, cu_seqlens: Tensor) -> Tensor:
    rewards = -0.1 * (logprobs - ref)
    return rewards.index_add(0, cu_seqlens[1:].long() - 1, scores)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    m = mask.to(x.dtype)
    mean = (x * m).sum() / m.sum()
    variance = ((x - mean) ** 2 * m).sum() / m.sum()
    return (x - mean) * torch.rsqrt(variance + 1e-8) * m


def gae_loop_trl(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Back over time, the columns kept in a list; padding is zeroed before, by the caller."""
    advantage, columns = rewards.new_zeros(rewards.shape[0]), []
    steps = rewards.shape[1]
    for t in range(steps - 1, -1, -1):
        after = values[:, t + 1] if t + 1 < steps else 0.0
        advantage = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + values


def gae_loop_verl(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """As above, but a masked step carries value and advantage over."""
    m = mask.to(values.dtype)
    value = advantage = values.new_zeros(values.shape[0])
    columns = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * value - values[:, t]
        here = delta + gamma * lam * advantage
        value = values[:, t] * m[:, t] + (1.0 - m[:, t]) * value
        advantage = here * m[:, t] + (1.0 - m[:, t]) * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    return advantages * m, (advantages + values) * m


def gae_loop_openrlhf(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Values and rewards are multiplied by the mask, then walked as in the first form."""
    m = mask.to(values.dtype)
    return gae_loop_trl(rewards * m, values * m, mask, gamma, lam)


def cut_by_sorting(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits with all but the top-k, then all but the nucleus, at -inf, by a sort of the vocabulary; ties stay."""
    z = logits / temperature
    z = z.masked_fill(z < z.topk(top_k, -1).values[:, -1:], -torch.inf)
    ordered = z.sort(-1, descending=True).values
    p = ordered.softmax(-1)
    least = ordered.masked_fill(p.cumsum(-1) - p >= top_p, torch.inf).amin(-1, keepdim=True)
    return z.masked_fill(z < least, -torch.inf)


def sample_by_sorting(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    logp = cut_by_sorting(logits, temperature, top_k, top_p).log_softmax(-1)
    token = torch.multinomial(logp.exp(), 1)
    return token.squeeze(1), logp.gather(1, token).squeeze(1)


def sample_by_sorting_in_full(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, ...]:
    token, logp = sample_by_sorting(logits, temperature, top_k, top_p)
    return token, logp, *logprobs_entropy(logits, token)
