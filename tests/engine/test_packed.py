"""A model's linear layers, norms and blocks on our kernels for a phase: the same results inside, its own after."""

from __future__ import annotations

import pytest
import torch
from ppomax.models import base_of
from ppomax.rollout.packed_weights import norm_of, packed_layers, packed_trunk, swiglu_layers

from tests.engine.families import BOS, FAMILIES, family
from tests.engine.sampled import decode


@pytest.mark.parametrize(("name", "norms"), [("llama", 7), ("gemma2", 13), ("gemma3", 19), ("qwen3", 13)])
def test_norms_run_on_our_kernel_while_the_phase_lasts(name: str, norms: int) -> None:
    model = family(name)
    found = [m for m in base_of(model).modules() if "RMSNorm" in type(m).__name__]
    assert len(found) == norms
    with torch.no_grad():
        for module in found:
            module.weight.uniform_(-1.0, 1.0)
    with torch.no_grad(), packed_trunk(model, "native") as panels:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_those_of_the_model(name: str, dtype: torch.dtype) -> None:
    model = family(name).to(dtype)
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        want = base_of(model)(input_ids=ids).last_hidden_state
        with packed_trunk(model, "native"):
            got = base_of(model)(input_ids=ids).last_hidden_state
        exact = base_of(model.double())(input_ids=ids).last_hidden_state
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    else:  # no further from the truth than the model's own
        assert (got - exact).abs().mean() <= 1.1 * (want - exact).abs().mean() + 1e-9


@pytest.mark.parametrize(("name", "blocks"), [("llama", 3), ("qwen2", 3), ("gemma2", 0), ("gpt2", 0)])
def test_gated_blocks_are_found_by_what_they_compute(name: str, blocks: int) -> None:
    """Gemma's gate is a GELU."""
    model = family(name)
    layers = set(packed_layers(model, "native"))
    assert sum(swiglu_layers(m, layers) is not None for m in base_of(model).modules()) == blocks


def test_bfloat16_decodes_on_our_kernels() -> None:
    model = family("llama").bfloat16()
    assert packed_layers(model, "native")
    given = decode(model, [[BOS, 5, 9], [BOS]], [0, 1], eos_ids=[], max_new_tokens=6, temperature=0.0)
    assert [len(t) for t in given.tokens] == [6, 6]
    alone = decode(model, [[BOS]], [1], eos_ids=[], max_new_tokens=6, temperature=0.0)
    assert alone.tokens[0] == given.tokens[1]
