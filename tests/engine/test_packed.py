"""A model's linear layers, norms and blocks on our kernels for a phase: the same results inside, its own after."""

from __future__ import annotations

import pytest
import torch
from ppomax.models import base_of
from ppomax.models.fused_trunk import ROTARY, fused_trunk, norm_of, swiglu_layers
from ppomax.models.packed import packed_hidden
from ppomax.rollout.arena import Arena
from ppomax.rollout.attention import Attention
from ppomax.rollout.packed_weights import packed_layers, packed_trunk
from ppomax_kernels.internal.paged_attention import PAGE
from transformers import PreTrainedModel

from tests.engine.families import BOS, FAMILIES, family
from tests.engine.sampled import decode
from tests.engine.tiny import prompts, small_config, tiny_engine


def native(model: PreTrainedModel) -> Attention:
    """A rollout's attention on a CPU, with a small arena."""
    return Attention(model, Arena(model.config, 4, model.dtype, model.device, PAGE), "native")


@pytest.mark.parametrize(("name", "norms"), [("llama", 7), ("gemma2", 13), ("gemma3", 19), ("qwen3", 13)])
def test_norms_run_on_our_kernel_while_the_phase_lasts(name: str, norms: int) -> None:
    model = family(name)
    found = [m for m in base_of(model).modules() if "RMSNorm" in type(m).__name__]
    assert len(found) == norms
    with torch.no_grad():
        for module in found:
            module.weight.uniform_(-1.0, 1.0)
    with torch.no_grad(), packed_trunk(model, native(model)) as panels:
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
        with packed_trunk(model, native(model)):
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
    assert sum(swiglu_layers(m) is not None for m in base_of(model).modules()) == blocks


def test_bfloat16_decodes_on_our_kernels() -> None:
    model = family("llama").bfloat16()
    assert packed_layers(model, "native")
    given = decode(model, [[BOS, 5, 9], [BOS]], [0, 1], eos_ids=[], max_new_tokens=6, temperature=0.0)
    assert [len(t) for t in given.tokens] == [6, 6]
    alone = decode(model, [[BOS]], [1], eos_ids=[], max_new_tokens=6, temperature=0.0)
    assert alone.tokens[0] == given.tokens[1]


# ---- forward and backward -------------------------------------------------------------------------------------------


def states_and_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 60, (23,), generator=generator)
    cu_seqlens = torch.tensor([0, 7, 8, 23], dtype=torch.int32)
    model.zero_grad()
    hidden = packed_hidden(model, tokens, cu_seqlens)
    weights = torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)
    (hidden * weights).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in base_of(model).parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_gradients_are_those_of_the_model(name: str) -> None:
    """As near to float64's as the model's own."""
    model = family(name)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
    plain = states_and_gradients(model)
    with fused_trunk(model):
        fused = states_and_gradients(model)
    exact = states_and_gradients(model.double())
    assert len(plain) == len(fused) == len(exact)
    for got, want, truth in zip(fused, plain, exact, strict=True):
        error, limit = ((x - truth).norm() / truth.norm().clamp(min=1e-20) for x in (got, want))
        assert error <= max(3 * limit, 3e-6)


def test_a_fused_trunk_is_as_it_was_afterwards() -> None:
    import sys

    model = family("llama")
    file = sys.modules[type(model).__module__]
    before = getattr(file, ROTARY)
    with fused_trunk(model):
        assert getattr(file, ROTARY) is not before
        parts = 7 + 1 + 3 + 3 * 4 + 1  # norms, rotary embedding, blocks, q, k, v and o, head
        assert sum("forward" in vars(m) for m in model.modules()) == parts
        with pytest.raises(RuntimeError), fused_trunk(model):
            raise RuntimeError
    assert getattr(file, ROTARY) is before
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("why", ["bfloat16", "ref"])
def test_what_cannot_or_must_not_is_left_alone(why: str) -> None:
    model = family("llama")
    if why == "bfloat16":
        model = model.bfloat16()
    with fused_trunk(model, impl="ref" if why == "ref" else "auto"):
        assert not any("forward" in vars(m) for m in model.modules())


def test_layers_that_are_called_out_of_order_are_each_their_own() -> None:
    """On other inputs, twice, or alone."""
    model = family("llama")
    attention = next(m for m in model.modules() if hasattr(m, "q_proj"))
    a, b = torch.randn(2, 4, attention.q_proj.in_features)
    calls = [("q_proj", a), ("q_proj", a), ("k_proj", b), ("v_proj", b), ("v_proj", a), ("q_proj", b), ("k_proj", a)]
    want = [getattr(attention, n)(x) for n, x in calls]
    with fused_trunk(model):
        got = [getattr(attention, n)(x) for n, x in calls]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


MODES: dict[str, dict[str, object]] = {
    "full": {},
    "recomputed": {"model__gradient_checkpointing": True},
    "lora": {"model__train": "lora"},
    "hydra": {"model__train": "hydra", "model__trained_layers": 1, "model__critic": "trunk"},
}


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_on_our_kernels_learns_what_one_of_plain_torch_does(mode: str) -> None:
    """And scores and trains by the same forward: ratios of the first minibatch agree to the bit, values but for the
    rounding of their change of units."""
    found = []
    for impl in ("auto", "ref"):
        engine = tiny_engine(small_config(impl=impl, **MODES[mode]))
        metrics, _ = engine.step(prompts(8))
        found.append((metrics, [p.detach().clone() for p in engine.policy.params]))
        assert metrics["val/first_ratio_gap"] == 0.0
        assert metrics["val/first_value_gap"] <= 1e-6
    for name in ("loss/policy_avg", "loss/value_avg", "objective/kl", "policy/grad_norm", "critic/grad_norm"):
        assert found[0][0][name] == pytest.approx(found[1][0][name], rel=1e-4, abs=1e-5)
    for p, q in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)
