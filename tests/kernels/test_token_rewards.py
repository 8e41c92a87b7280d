"""token_rewards against float64."""

from itertools import pairwise

import numpy as np
import ppomax_kernels as K
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from . import strategies, verify
from .backends import Backend
from .cases import REWARDS, Tokens
from .contract import f64, hold, same_bits


@pytest.mark.parametrize(("lengths", "case"), REWARDS, ids=str)
def test_oracle(impl: Backend, lengths: tuple[int, ...], case: Tokens) -> None:
    verify.token_rewards(impl.bind(K.token_rewards), lengths, case, impl.device)


@given(lengths=st.lists(st.integers(1, 60), max_size=7), case=strategies.tokens())
def test_drawn(impl: Backend, lengths: list[int], case: Tokens) -> None:
    plain = Tokens(
        (sum(lengths),),
        case.style,
        "none",
        case.dtype,
        case.other,
        kl_coef=case.kl_coef,
        estimator=case.estimator,
        seed=case.seed,
    )
    verify.token_rewards(impl.bind(K.token_rewards), tuple(lengths), plain, impl.device)


@pytest.mark.parametrize("length", [1, 2, 17])
def test_score_sits_on_the_last_token(impl: Backend, length: int) -> None:
    zero = torch.zeros(2 * length, device=impl.device)
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=impl.device)
    scores = torch.tensor([3.0, -5.0], device=impl.device)
    wanted = np.zeros(2 * length)
    wanted[[length - 1, -1]] = 3.0, -5.0
    np.testing.assert_array_equal(f64(K.token_rewards(scores, zero, zero, ends, kl_coef=0.1, impl=impl.name)), wanted)


def test_sum_is_score_minus_penalty(impl: Backend) -> None:
    x = Tokens((50,), "near").draw(impl.device)
    scores, ends = torch.tensor([2.5], device=impl.device), torch.tensor([0, 50], dtype=torch.int32, device=impl.device)
    r = K.token_rewards(scores, x["first"], x["reference"], ends, kl_coef=0.07, impl=impl.name)
    u = f64(x["first"]) - f64(x["reference"])
    hold("sum of rewards", r.double().sum().float(), np.float64(2.5 - 0.07 * u.sum()), r.sum())


def test_alone_or_among_many(impl: Backend) -> None:
    x = Tokens((90,), "far").draw(impl.device)
    bounds = [0, 1, 34, 90]
    scores = torch.tensor([1.0, -2.0, 0.3], device=impl.device)
    ends = torch.tensor(bounds, dtype=torch.int32, device=impl.device)
    whole = K.token_rewards(scores, x["first"], x["reference"], ends, kl_coef=0.1, estimator="k3", impl=impl.name)
    for s, (a, b) in enumerate(pairwise(bounds)):
        only = torch.tensor([0, b - a], dtype=torch.int32, device=impl.device)
        alone = K.token_rewards(
            scores[s : s + 1], x["first"][a:b], x["reference"][a:b], only, kl_coef=0.1, estimator="k3", impl=impl.name
        )
        same_bits(f"sequence {s}", alone, whole[a:b])
