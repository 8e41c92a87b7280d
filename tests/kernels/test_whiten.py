"""whiten against float64."""

import ppomax_kernels as K
import pytest
import torch
from hypothesis import given
from ppomax_kernels.whiten import APPLY, combine_moments
from ppomax_kernels.whiten import MOMENTS as TABLE

from . import strategies, verify
from .backends import Backend
from .cases import SPREADS, Spread
from .contract import all_zero, hold_moments, same_bits


@pytest.mark.parametrize("case", SPREADS, ids=str)
def test_oracle(impl: Backend, case: Spread) -> None:
    verify.whiten(impl.bind(K.whiten), case, impl.device)


@given(case=strategies.spreads())
def test_drawn(impl: Backend, case: Spread) -> None:
    verify.whiten(impl.bind(K.whiten), case, impl.device)


def test_one_kept_entry(impl: Backend) -> None:
    x = torch.tensor([1.0, 7.25, 3.0], device=impl.device)
    mask = torch.tensor([False, True, False], device=impl.device)
    all_zero("a single kept entry", K.whiten(x, mask, impl=impl.name))
    same_bits("its mean kept", K.whiten(x, mask, shift_mean=False, impl=impl.name), torch.where(mask, x, 0.0))
    all_zero("no kept entry", K.whiten(x, mask & False, impl=impl.name))


@pytest.mark.parametrize("cut", [1, 13, 4096, 9999])
def test_moments_of_parts_are_those_of_the_whole(impl: Backend, cut: int) -> None:
    """Running moments: any split combines to the moments of all, in float64."""
    x, mask = Spread((10000,), "some", mean=100.0, seed=1).draw(impl.device)
    parts = torch.stack([TABLE[impl.name](x[s], mask[s]) for s in (slice(0, cut), slice(cut, None))])
    kept = x[mask.bool()].double()
    truth = torch.stack(
        [
            torch.tensor(float(len(kept)), dtype=torch.float64, device=impl.device),
            kept.mean(),
            ((kept - kept.mean()) ** 2).sum(),
        ]
    )
    hold_moments("of all", TABLE[impl.name](x, mask), truth)
    hold_moments("of parts", combine_moments(parts), truth)


def test_map_of_a_token_depends_on_the_token(impl: Backend) -> None:
    x, _ = Spread((77,), seed=3).draw(impl.device)
    stats = TABLE[impl.name](x, None)
    whole = APPLY[impl.name](x, None, stats, True, 1e-8)
    for cut in (slice(0, 1), slice(5, 40), slice(1, 77)):
        same_bits(f"{cut}", APPLY[impl.name](x[cut], None, stats, True, 1e-8), whole[cut])
