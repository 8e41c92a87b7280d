"""An arena too small for every slot's longest course: sequences grow page by page, the youngest start anew, and what is
drawn is what a large arena gives."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppomax.rollout.arena import Arena
from ppomax.rollout.slots import Slots

from tests.engine.families import family
from tests.engine.sampled import decode
from tests.engine.test_rollout import ENDS, prompts_of
from tests.engine.tiny import tiny_tokenizer

module = importlib.import_module("ppomax.rollout.decode")
PAGE = 16
LENGTHS = [3, 17, 30, 16, 1, 9, 40, 5]


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> list[Arena]:
    """Those that decode makes."""
    made: list[Arena] = []
    real = module.Arena

    def note(*args: Any, **named: Any) -> Arena:
        made.append(real(*args, **named))
        return made[-1]

    monkeypatch.setattr(module, "Arena", note)
    return made


@pytest.fixture
def hopeful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence is expected to end at its next token, so that far too many are let in."""
    monkeypatch.setattr(Slots, "_expected", lambda self: 1)


def repeated(lengths: list[int], each: int) -> list[list[int]]:
    return [p for p in prompts_of(lengths) for _ in range(each)]


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("ends", [ENDS, ()], ids=["some end", "none ends"])
def test_tokens_are_those_of_a_large_arena_and_no_page_is_lost(
    each: int, ends: tuple[int, ...], arenas: list[Arena], hopeful: None
) -> None:
    model, prompts = family("llama"), repeated(LENGTHS, each)
    options = dict(eos_ids=ends, max_new_tokens=60, seed=2, slots=8)
    want = decode(model, prompts, range(len(prompts)), **options)
    got = decode(model, prompts, range(len(prompts)), cache_tokens=16 * PAGE, **options)
    assert got.tokens == want.tokens
    assert got.finished == want.finished
    for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    assert want.stats.put_back == 0
    assert got.stats.put_back > 0 or (ends and each == 1)
    assert got.stats.pages == 16
    assert all(sorted(a.free) == list(range(a.pages)) for a in arenas)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=7),
    each=st.integers(1, 3),
    limit=st.integers(1, 50),
    slots=st.integers(1, 9),
    more=st.integers(0, 6),
    expected=st.sampled_from([None, 1, 10]),
    ends=st.sampled_from([ENDS, ()]),
)
def test_any_room_that_holds_one_sequence_serves(
    lengths: list[int], each: int, limit: int, slots: int, more: int, expected: int | None, ends: tuple[int, ...]
) -> None:
    model, prompts = family("llama"), repeated(lengths, each)
    options = dict(eos_ids=ends, max_new_tokens=limit, seed=1, slots=slots)
    # A sequence's own course, and its prompt's pages where siblings share them.
    least = max(-(-(n + limit - 1) // PAGE) + (each > 1) * bool(n % PAGE) for n in lengths)
    want = decode(model, prompts, range(len(prompts)), **options).tokens
    with pytest.MonkeyPatch.context() as patch:
        if expected is not None:
            patch.setattr(Slots, "_expected", lambda self: expected)
        got = decode(model, prompts, range(len(prompts)), cache_tokens=(least + more) * PAGE, **options)
    assert got.tokens == want


def test_sequences_that_end_early_leave_room_for_more_at_once() -> None:
    """Steps, of responses of 12 tokens in the mean under a limit of 100: a quarter of the room, near the same steps."""
    model, prompts = family("llama"), repeated([6] * 24, 1)
    options = dict(eos_ids=ENDS, max_new_tokens=100, seed=3, slots=12)
    large = decode(model, prompts, range(24), **options)
    small = decode(model, prompts, range(24), cache_tokens=12 * 7 * PAGE // 4, **options)
    assert small.tokens == large.tokens
    lengths = [len(t) for t in large.tokens]
    whole_courses = 12 // 4  # that many had room at once when each took all of its own
    assert small.stats.steps < 0.6 * sum(lengths) / whole_courses
    assert small.stats.occupied / small.stats.steps > 1.5 * whole_courses


@pytest.mark.parametrize(
    "knobs",
    [
        {"top_k": 5},
        {"top_p": 0.8},
        {"repetition_penalty": 1.3},
        {"exact": True},
        {"trunk_layers": 1},
        {"stop": ["w7"], "tokenizer": tiny_tokenizer()},
        {"min_new_tokens": 20},
    ],
    ids=lambda k: next(iter(k)),
)
def test_what_is_recorded_is_that_of_a_large_arena(knobs: dict[str, Any], hopeful: None) -> None:
    model, prompts = family("llama"), repeated(LENGTHS[:5], 2)
    options = dict(eos_ids=(), max_new_tokens=50, seed=2, slots=6) | knobs
    want = decode(model, prompts, range(10), **options)
    got = decode(model, prompts, range(10), cache_tokens=10 * PAGE, **options)
    assert got.stats.put_back > 0
    assert got.tokens == want.tokens
    for ours, theirs in ((got.kept, want.kept), (got.scored, want.scored), (got.trunk, want.trunk)):
        assert (ours is None) == (theirs is None)
        for a, b in zip(ours or [], theirs or [], strict=True):
            torch.testing.assert_close(a, b, rtol=0 if "exact" in knobs else 1e-4, atol=0 if "exact" in knobs else 1e-5)


def test_a_listener_hears_each_token_once(hopeful: None) -> None:
    model, prompts = family("llama"), repeated(LENGTHS, 1)
    heard: list[list[int]] = [[] for _ in prompts]
    got = decode(
        model, prompts, range(len(prompts)), eos_ids=(), max_new_tokens=60, seed=2, slots=8, cache_tokens=12 * PAGE,
        on_token=lambda i, token, last: heard[i].append(token),
    )  # fmt: skip
    assert got.stats.put_back > 0
    assert heard == got.tokens


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("ends", [ENDS, ()], ids=["some end", "none ends"])
def test_steps_that_are_read_late_change_nothing(
    each: int, ends: tuple[int, ...], hopeful: None, arenas: list[Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a sequence that has ended, or was put back, takes part in one step more."""
    model, prompts = family("llama"), repeated(LENGTHS, each)
    options = dict(eos_ids=ends, max_new_tokens=60, seed=2, slots=8)
    want = decode(model, prompts, range(len(prompts)), **options)
    monkeypatch.setattr(module, "reads_late", lambda device: True)
    for room in (None, 12 * PAGE, 9 * PAGE):
        got = decode(model, prompts, range(len(prompts)), cache_tokens=room, **options)
        assert got.tokens == want.tokens
        assert got.finished == want.finished
    assert ends or got.stats.put_back > 0
    assert all(sorted(a.free) == list(range(a.pages)) for a in arenas)
