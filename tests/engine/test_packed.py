"""A model's linear layers and norms on our kernels for a phase: the same results inside, the model's own after."""

from __future__ import annotations

import pytest
import torch
from ppomax.models import base_of
from ppomax.rollout.packed import norm_of, packed_linears

from tests.engine.families import family


@pytest.mark.parametrize(("name", "norms"), [("llama", 7), ("gemma2", 13), ("gemma3", 19), ("qwen3", 13)])
def test_norms_run_on_our_kernel_while_the_phase_lasts(name: str, norms: int) -> None:
    model = family(name)
    found = [m for m in base_of(model).modules() if "RMSNorm" in type(m).__name__]
    assert len(found) == norms
    with torch.no_grad():
        for module in found:
            module.weight.uniform_(-1.0, 1.0)
    with torch.no_grad(), packed_linears(model, "native") as panels:
        assert panels is not None
        for module in found:
            x = torch.randn(3, 5, len(module.weight))
            torch.testing.assert_close(module(x), type(module).forward(module, x), rtol=1e-6, atol=1e-6)
            assert "forward" in vars(module)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_norm_of_another_formula_is_left_alone() -> None:
    class OtherRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.9 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    assert norm_of(OtherRMSNorm()) is None
    assert norm_of(torch.nn.LayerNorm(8)) is None
