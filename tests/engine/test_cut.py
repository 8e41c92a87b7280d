"""Sampling that is cut (top-k, top-p, a forbidden EOS): what each token was drawn from is recorded, and scores, ratio,
KL and losses are those of the distribution over it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppomax.engine import Engine
from ppomax.models import head_of, packed_hidden
from ppomax.recipe.batch import Experience, minibatch
from ppomax.recipe.cut import cut_logprobs
from ppomax.recipe.update import policy_loss
from ppomax.rollout import Sampling, decode
from ppomax.rollout.kept import Cut, column_of, kept_rows, only_kept, token_at
from torch import Tensor

from tests.engine.tiny import EOS, VOCABULARY, prompts, small_config, tiny_engine, tiny_policy

CUTS = [
    {"rollout__top_k": 5},
    {"rollout__top_k": 5, "rollout__top_p": 0.7},
    {"rollout__top_p": 0.8},
    {"rollout__top_p": 0.8, "rollout__temperature": 0.6},
    {"rollout__min_new_tokens": 4},
    {"rollout__top_k": 8, "rollout__min_new_tokens": 4},
]


def sets_of(logits: Tensor, cut: Cut) -> list[set[int]]:
    """By the words alone: the k likeliest, of these the fewest whose mass reaches p."""
    found = []
    for row in logits.double() / cut.temperature:
        order = [t for t in row.argsort(descending=True).tolist() if row[t] > -torch.inf][: cut.top_k or len(row)]
        weight = row[order].softmax(0)
        count = 1
        while float(weight[:count].sum()) < cut.top_p * (1 - 1e-12) and count < len(order):
            count += 1
        found.append(set(order[:count]))
    return found


def members(kept: Tensor, vocabulary: int) -> list[set[int]]:
    present = only_kept(torch.zeros(len(kept), vocabulary), kept) == 0
    if kept.dtype == torch.uint8:
        return [set(row.nonzero()[:, 0].tolist()) for row in present]
    return [set(ids[row].tolist()) for ids, row in zip(kept, present, strict=True)]


@given(st.integers(2, 90), st.sampled_from([0, 1, 3, 40, 64, 65, 80]), st.floats(0.05, 1), st.integers(0, 9999))
def test_sets_are_what_the_words_say(vocabulary: int, top_k: int, top_p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, vocabulary, generator=generator) * 3
    logits[:2, 0] = -torch.inf
    cut = Cut(top_k, top_p, 0.8)
    kept = kept_rows(logits, cut)
    assert members(kept, vocabulary) == sets_of(logits, cut)
    assert kept.element_size() * kept.shape[1] == cut.row_bytes(vocabulary)
    for i, ids in enumerate(members(kept, vocabulary)):
        for token in sorted(ids)[:3]:
            column = column_of(torch.tensor([token]), kept[i : i + 1])
            assert only_kept(logits[i : i + 1], kept[i : i + 1])[0, column] == logits[i, token]
            assert token_at(column, kept[i : i + 1]).tolist() == [token]


def test_equals_are_all_kept_as_bits_and_as_many_as_fit_as_ids() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert members(kept_rows(logits, Cut(0, 0.6, 1.0)), 5) == [{0, 1, 2, 3}]
    assert len(members(kept_rows(logits, Cut(2, 1.0, 1.0)), 5)[0]) == 2


@pytest.mark.parametrize("how", [{"top_k": 7}, {"top_p": 0.7}, {"top_k": 7, "top_p": 0.7, "min_new_tokens": 3}])
def test_recording_changes_no_token(how: dict[str, Any]) -> None:
    model, given = tiny_policy(), prompts(12)
    plain = Sampling(12, seed=3, slots=5, temperature=0.9, **how)
    recorded = dataclasses.replace(plain, record_kept=True)
    got = [decode(model, given, range(12), s, eos_ids=[EOS]) for s in (plain, recorded)]
    assert got[0].tokens == got[1].tokens
    for a, b in zip(got[0].logprobs, got[1].logprobs, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert got[0].kept is None
    assert got[1].kept is not None
    for tokens, kept in zip(got[1].tokens, got[1].kept, strict=True):
        assert all(t in ids for t, ids in zip(tokens, members(kept, VOCABULARY), strict=True))


@pytest.mark.parametrize("mode", ["full", "lora", "hydra"])
@pytest.mark.parametrize("knobs", CUTS)
def test_scores_are_of_what_was_sampled_from(knobs: dict[str, Any], mode: str) -> None:
    engine = tiny_engine(small_config(model__train=mode, model__trained_layers=1, **knobs))
    roll = engine.rollout(prompts(8))
    torch.testing.assert_close(roll.logprobs, roll.sampler_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(roll.ref_logprobs, roll.logprobs, rtol=0, atol=1e-6)
    metrics = engine.update(engine.experience(roll))
    assert metrics["val/first_ratio_gap"] < 1e-5


def test_without_the_sets_the_ratio_to_the_sampler_is_off_by_the_lost_mass() -> None:
    engine = tiny_engine(small_config(rollout__top_k=5, rollout__allow_biased_sampling=True))
    roll = engine.rollout(prompts(8))
    assert roll.kept is None
    assert float((roll.sampler_logprobs - roll.logprobs).max()) > 0.05


def moved(**knobs: Any) -> tuple[Engine, Experience]:
    engine = tiny_engine(small_config(**knobs))
    experience = engine.experience(engine.rollout(prompts(8)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in engine.policy.params:
            p.add_(torch.randn(p.shape, generator=generator) * 0.03)
    return engine, experience


def expected(engine: Engine, exp: Experience) -> Tensor:
    """The loss by a loop over tokens and their sets."""
    roll, loss, model = exp.rollout, engine.config.loss, engine.policy.module
    assert roll.kept is not None
    hidden = packed_hidden(model, roll.tokens, roll.cu_seqlens)[roll.states]
    logits = head_of(model).logits(hidden).double() / engine.config.rollout.temperature
    total = logits.new_zeros(())
    for n, ids in enumerate(members(roll.kept, VOCABULARY)):
        own = sorted(ids)
        log_p = logits[n, own].log_softmax(0)
        w = (log_p[own.index(int(roll.labels[n]))] - roll.logprobs[n]).exp()
        a = exp.advantages[n].double()
        surrogate = torch.maximum(-a * w, -a * w.clamp(1 - (loss.clip_low or 0), 1 + (loss.clip_high or 0)))
        total = total + surrogate - loss.ent_coef * -(log_p.exp() * log_p).sum()
    return total / len(roll.labels)


@pytest.mark.parametrize("rows", [1000, 7])
@pytest.mark.parametrize("knobs", [CUTS[1], CUTS[3], CUTS[5]])
def test_loss_and_gradients_are_the_formula(knobs: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppomax.recipe.cut.CHUNK_BYTES", 4 * VOCABULARY * rows)
    engine, exp = moved(loss__ent_coef=0.1, **knobs)
    params = list(engine.policy.module.parameters())
    want = expected(engine, exp)
    want_gradients = torch.autograd.grad(want, params)
    whole = minibatch(exp, torch.arange(8))
    loss, metrics = policy_loss(engine.policy, whole, torch.tensor(float(len(whole.labels))), engine.config)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    assert float(metrics["tokens"]) == len(whole.labels)
    w = (metrics["ratio_max"] - 1).abs()
    assert float(metrics["ratio_gap"]) >= float(w) * (1 - 1e-6) > 0
    for got, gradient in zip(torch.autograd.grad(loss, params), want_gradients, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-6)


def test_a_label_outside_its_set_has_no_probability() -> None:
    model = tiny_policy()
    hidden = torch.randn(1, 32)
    kept = torch.zeros(1, VOCABULARY // 8, dtype=torch.uint8)
    kept[0, 0] = 1
    logprobs, entropy = cut_logprobs(hidden, head_of(model), torch.tensor([3]), kept, 1.0)
    assert logprobs.tolist() == [-torch.inf]
    assert entropy.tolist() == [0.0]
