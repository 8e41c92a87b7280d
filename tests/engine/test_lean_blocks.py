"""Blocks without what is around their kernels: the same bits as the blocks, for those of the form, and no others."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from ppomax.models import blocks_of
from ppomax.models.recompute import recompute_blocks
from ppomax.rollout import Responses, Sampling, decode, packed_weights
from ppomax.rollout.lean_blocks import LeanBlock
from ppomax_kernels.internal.decode_block import DecodeBlock, Parts
from ppomax_kernels.internal.packed_linear import Packed, pack
from ppomax_kernels.internal.rms_norm import NormTerms

from .families import FAMILIES, family
from .tiny import prompts

LEAN = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks that ran lean, by their index."""
    seen: list[int] = []

    def counted(real: Any) -> Any:
        def call(self: LeanBlock, *given: Any) -> Any:
            seen.append(self.index)
            return real(self, *given)

        return call

    for name in ("run", "at_once"):
        monkeypatch.setattr(LeanBlock, name, counted(getattr(LeanBlock, name)))
    return seen


def drawn(model: Any, **more: Any) -> Responses:
    sampling = Sampling(max_new_tokens=10, **{"slots": 3, **more})
    return decode(model, prompts(7), range(7), sampling, eos_ids=[2])


def plain(model: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Responses:
    with monkeypatch.context() as patch:
        patch.setattr(packed_weights, "lean_blocks", lambda *given: {})
        return drawn(model, **more)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_tokens_and_bits(name: str, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With newcomers in between, a window, grouped heads, and norms of query and key."""
    model = family(name)
    want = plain(model, monkeypatch)
    assert not runs
    for _ in range(2):
        got = drawn(model)
        assert got.tokens == want.tokens
        assert got.logprobs == want.logprobs
    assert bool(runs) == (name in LEAN)
    assert set(runs) == (set(range(len(blocks_of(model)))) if runs else set())


def test_what_enters_a_block_is_recorded_all_the_same(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = family("llama"), prompts(7)
    sampling = Sampling(max_new_tokens=6)
    got = decode(model, asked, range(7), sampling, eos_ids=[2], trunk_layers=1)
    assert runs
    monkeypatch.setattr(packed_weights, "lean_blocks", lambda *given: {})
    want = decode(model, asked, range(7), sampling, eos_ids=[2], trunk_layers=1)
    for a, b in zip(got.trunk or [], want.trunk or [], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_a_block_that_does_more_is_left_alone(scale: float, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Granite's, whose parts have Llama's names and whose sums are weighed."""
    model = family("llama")
    kind = type(blocks_of(model)[0])
    real = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda self, x, *rest, **named: x + scale * (real(self, x, *rest, **named) - x)
    )
    want = plain(model, monkeypatch)
    got = drawn(model)
    assert got.tokens == want.tokens
    asked = len(runs)
    drawn(model)
    assert (len(runs) > asked) == (scale == 1.0)  # asked once, and then no more


def test_somebody_who_looks_inside_sees_every_step(runs: list[int]) -> None:
    model, seen = family("llama"), []
    model.model.layers[1].mlp.register_forward_hook(lambda *given: seen.append(1))
    drawn(model)
    assert set(runs) == {0, 2}
    assert len(seen) > 10


def test_what_was_put_around_a_block_stays(runs: list[int]) -> None:
    """Recomputing blocks run lean and are recomputing ones afterwards; what we do not know is left alone."""
    model = family("llama")
    recompute_blocks(model)
    before = [block.forward for block in blocks_of(model)]
    drawn(model)
    assert runs
    assert [block.forward for block in blocks_of(model)] == before
    block = blocks_of(model)[1]
    block.forward = partial(type(block).forward, block)
    runs.clear()
    drawn(model)
    assert set(runs) == {0, 2}
    assert isinstance(block.forward, partial)


def test_new_weights_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama")
    drawn(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert drawn(model).tokens == plain(model, monkeypatch).tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LEAN)
def test_one_call_is_its_parts_to_the_bit(
    name: str, dtype: torch.dtype, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, exact = family(name).to(dtype), dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(LeanBlock, "at_once", LeanBlock.run)
        want = drawn(model, exact=exact)
    assert runs
    got = drawn(model, exact=exact)  # the first phase, in which blocks are asked, had the same bits
    assert got.tokens == want.tokens
    assert got.logprobs == want.logprobs
    for a, b in zip(got.scored or (), want.scored or (), strict=True):
        assert torch.equal(a, b)


def test_a_block_whose_parts_do_not_fit_is_refused() -> None:
    def packed(outputs: int, inputs: int) -> Packed:
        return Packed(pack(torch.ones(outputs, inputs)), None, outputs)

    norm = NormTerms(torch.ones(8), 0.0, 1e-6)
    fits = Parts(norm, norm, None, packed(16, 8), packed(8, 8), packed(24, 8), packed(8, 12))
    DecodeBlock(fits, 2, 1, 4)
    for change in (
        {"down": packed(8, 13)},
        {"qkv": packed(20, 8)},
        {"out": Packed(fits.out.panels.double(), None, 8)},
        {"gate_up": Packed(fits.gate_up.panels, torch.ones(23), 24)},
        {"before_mlp": NormTerms(torch.ones(7), 0.0, 1e-6)},
        {"of_heads": (NormTerms(torch.ones(4), 0.0, 1e-6), norm)},
    ):
        with pytest.raises(ValueError, match="decode_block: "):
            DecodeBlock(fits._replace(**change), 2, 1, 4)
