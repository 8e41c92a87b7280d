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

from .families import FAMILIES, family
from .tiny import prompts

LEAN = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks that ran lean, by their index."""
    seen: list[int] = []
    real = LeanBlock.run

    def counted(self: LeanBlock, *given: Any) -> Any:
        seen.append(self.index)
        return real(self, *given)

    monkeypatch.setattr(LeanBlock, "run", counted)
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
