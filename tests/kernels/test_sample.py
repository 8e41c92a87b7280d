"""sample against the exact distribution, and its random stream against the published one."""

import numpy as np
import ppomax_kernels as K
import pytest
import torch
from ppomax_kernels.backends.reference import philox_uniform

from . import sampling
from .backends import Backend
from .contract import hold, same_bits
from .sampling import DRAWS, Draw, philox, uniform

# Random123's known-answer file gives philox4x32-10 of an all-zero counter and key as 6627e8d5 e169c58d bc57ac4c
# 9b00dbd8.
KNOWN = 0x6627E8D5
# 99.99 % of chi-square draws lie below mean + 6 standard deviations for tens of degrees of freedom; draws are fixed
# by seeds.
DEVIATIONS = 6.0


def test_own_philox_is_the_published_one() -> None:
    assert philox(0, 0) == KNOWN


def test_reference_stream() -> None:
    g = torch.Generator().manual_seed(1)
    seeds = torch.tensor([0, -1, 2**63 - 1, *torch.randint(-(2**63), 2**63 - 1, (40,), generator=g).tolist()])
    positions = torch.tensor([0, 1, 2**35, *torch.randint(0, 2**40, (40,), generator=g).tolist()])
    wanted = [uniform(s, p) for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)]
    assert philox_uniform(seeds, positions).tolist() == wanted


@pytest.mark.parametrize("case", DRAWS, ids=str)
def test_oracle(impl: Backend, case: Draw) -> None:
    sampling.sample(impl.bind(K.sample), case, impl.device)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 20, 0.9)])
def test_chi_square(impl: Backend, temperature: float, top_k: int, top_p: float) -> None:
    draws = 60 if impl.interpreted else 20000
    row = 1.5 * torch.randn(40, generator=torch.Generator().manual_seed(2))
    p, _ = sampling.distribution(row.double().numpy(), temperature, top_k, top_p)
    logits = row.to(impl.device).expand(draws, -1)
    seeds = torch.full((draws,), 77, device=impl.device)
    positions = torch.arange(draws, device=impl.device)
    token = K.sample(logits, seeds, positions, temperature=temperature, top_k=top_k, top_p=top_p, impl=impl.name)[0]
    count = np.bincount(token.cpu().numpy(), minlength=40)
    assert count[p == 0].sum() == 0
    expected = draws * p[p > 0]
    chi = ((count[p > 0] - expected) ** 2 / expected).sum()
    freedom = (p > 0).sum() - 1
    assert chi < freedom + DEVIATIONS * np.sqrt(2.0 * freedom), (
        f"chi-square {chi:.1f} with {freedom} degrees of freedom"
    )


def test_alone_or_among_many(impl: Backend) -> None:
    """A row's draw does not depend on the batch."""
    logits, seeds, positions = DRAWS[4].draw(impl.device)
    options = dict(temperature=0.8, top_k=12, top_p=0.9, impl=impl.name)
    every = K.sample(logits, seeds, positions, **options)
    for i in range(len(logits)):
        one = slice(i, i + 1)
        for what, a, b in zip(
            ("token", "logprob", "plain", "entropy"),
            K.sample(logits[one], seeds[one], positions[one], **options),
            every,
            strict=True,
        ):
            same_bits(f"{what} of row {i}", a, b[one])


def test_position_moves_the_stream(impl: Backend) -> None:
    logits = torch.zeros(64, 1000, device=impl.device)
    seeds, positions = torch.full((64,), 5, device=impl.device), torch.arange(64, device=impl.device)
    tokens = K.sample(logits, seeds, positions, impl=impl.name)[0]
    assert len(set(tokens.tolist())) > 50
    assert tokens.tolist() == [int(uniform(5, i) * 1000) for i in range(64)]


def test_ties_are_kept(impl: Backend) -> None:
    n = 40 if impl.interpreted else 400
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, -1.0]], device=impl.device).expand(n, -1)
    seeds, positions = torch.full((n,), 5, device=impl.device), torch.arange(n, device=impl.device)
    for options in (dict(top_k=2), dict(top_p=0.2)):
        token, logprob, *_ = K.sample(logits, seeds, positions, impl=impl.name, **options)
        assert set(token.tolist()) == {1, 2, 3}, options
        hold("logprob of three alike", logprob, np.full(n, -np.log(3.0)), torch.full((n,), float(-np.log(3.0))))


def test_minus_inf_is_never_drawn(impl: Backend) -> None:
    logits = torch.full((40, 9), -float("inf"), device=impl.device)
    logits[:, 3], logits[:, 8] = 1.0, -2.0
    seeds, positions = torch.full((40,), 9, device=impl.device), torch.arange(40, device=impl.device)
    tokens = set(K.sample(logits, seeds, positions, impl=impl.name)[0].tolist())
    assert tokens == {3, 8}


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_nothing_to_draw_from(impl: Backend, bad: float) -> None:
    logits = torch.zeros(3, 5, device=impl.device)
    logits[1] = bad
    seeds = positions = torch.zeros(3, dtype=torch.int64, device=impl.device)
    if impl.device == "cpu" and impl.name != "triton":
        with pytest.raises(ValueError, match="sample: row 1 of logits"):
            K.sample(logits, seeds, positions, impl=impl.name)
        return
    token, *rest = K.sample(logits, seeds, positions, impl=impl.name)
    assert token.tolist()[1] == -1
    for x in rest:
        assert torch.isnan(x).tolist() == [False, True, False]
