"""Switches for what the paper, its code and later work studied besides the recipe, each against a formula of its own:
KL over the whole vocabulary, rewards scaled by rolling returns, a repetition penalty, a reference that follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ppomax.config import ConfigError
from ppomax.engine import Engine
from ppomax.models.modes import start_policy
from ppomax.recipe.batch import Rollout
from ppomax.recipe.measures import experience_metrics
from ppomax.recipe.rewards import Scores, rolling_returns
from ppomax.rollout import Sampling, decode
from ppomax.rollout.sizes import RolloutError
from torch import Tensor
from transformers import PreTrainedModel

from tests.engine.tiny import EOS, prompts, small_config, tiny_engine, tiny_policy, tiny_reward

MODES = {
    "full": {},
    "lora": {"model__train": "lora"},
    "hydra": {"model__train": "hydra", "model__trained_layers": 1},
}


def engine_of(**knobs: Any) -> Engine:
    return tiny_engine(small_config(**{"policy_optim__lr": 3e-3, "policy_optim__warmup": 0.0, **knobs}))


def log_softmaxes(model: PreTrainedModel, roll: Rollout, temperature: float) -> Tensor:
    """(N, V) float64, sequence by sequence through the model's own forward."""
    rows = []
    for prompt, response in roll.sequences():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        rows.append((logits.double() / temperature).log_softmax(-1))
    return torch.cat(rows)


@torch.no_grad()
def both(engine: Engine, roll: Rollout, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of policy and reference."""
    own = log_softmaxes(engine.policy.module, roll, temperature)
    with start_policy(engine.policy, engine.reference) as start:
        return own, log_softmaxes(start, roll, temperature)


# ---- KL over the whole vocabulary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_kl_is_summed_over_all_tokens_at_each_state(mode: str) -> None:
    engine = engine_of(kl__estimator="vocabulary", kl__coef=0.3, rollout__temperature=0.7, **MODES[mode])
    first = engine.rollout(prompts(8))
    assert first.kl is not None
    assert torch.equal(first.kl, torch.zeros_like(first.kl))
    engine.update(engine.experience(first))
    roll = engine.rollout(prompts(8, seed=1))
    own, ref = both(engine, roll, 0.7)
    want = (own.exp() * (own - ref)).sum(-1)
    assert float(want.max()) > 1e-3
    torch.testing.assert_close(roll.kl.double(), want, rtol=1e-4, atol=1e-6)
    experience = engine.experience(roll)
    ends = roll.response_cu[1:].long() - 1
    rewards = (-0.3 * want).index_add(0, ends, experience.shaped_scores.double())
    torch.testing.assert_close(experience.rewards.double(), rewards, rtol=1e-4, atol=1e-5)
    metrics = experience_metrics(experience)
    assert metrics["objective/kl_vocabulary"] == pytest.approx(float(want.mean()), rel=1e-4)
    penalty = -0.3 * float(want.sum()) / len(roll.finished)
    assert metrics["objective/non_score_reward"] == pytest.approx(penalty, rel=1e-3)


def test_of_cut_sampling_it_is_over_what_could_be_drawn() -> None:
    engine = engine_of(kl__estimator="vocabulary", rollout__top_k=5)
    engine.step(prompts(8))
    roll = engine.rollout(prompts(8, seed=1))
    own, ref = both(engine, roll)
    kept = torch.zeros_like(own, dtype=torch.bool)
    for row, ids in zip(kept, roll.kept.tolist(), strict=True):
        row[[i for i in ids if i >= 0]] = True
    own, ref = (x.masked_fill(~kept, -torch.inf).log_softmax(-1) for x in (own, ref))
    want = (own.exp() * (own - ref).masked_fill(~kept, 0.0)).sum(-1)
    torch.testing.assert_close(roll.kl.double(), want, rtol=1e-4, atol=1e-6)


def test_the_drawn_tokens_estimate_has_it_as_its_mean() -> None:
    """k1 over many draws at the same first states."""
    engine = engine_of(kl__estimator="vocabulary", rollout__max_new_tokens=1)
    for i in range(3):
        engine.step(prompts(8, seed=i))
    roll = engine.rollout([prompts(1, seed=5)[0]] * 1000)
    gap = roll.logprobs - roll.ref_logprobs
    error = 4 * float(gap.std()) / len(gap) ** 0.5
    assert float(gap.mean()) == pytest.approx(float(roll.kl[0]), abs=error)
    assert error < 0.5 * float(roll.kl[0])


def test_no_other_estimator_pays_for_it() -> None:
    assert engine_of().rollout(prompts(2)).kl is None


# ---- temperature 1 beside the sampling temperature ------------------------------------------------------------------


def test_kl_and_perplexity_at_temperature_one_stand_beside_those_sampled_at_another() -> None:
    engine = engine_of(rollout__temperature=0.5)
    engine.step(prompts(8))
    roll = engine.rollout(prompts(8, seed=1))
    metrics = experience_metrics(engine.experience(roll))
    own, ref = (x.gather(-1, roll.labels[:, None])[:, 0] for x in both(engine, roll))
    sampled = roll.logprobs.double()
    k3 = (ref - own).exp() - 1 - (ref - own)
    want = float(((own - sampled).exp() * k3).mean())
    assert metrics["objective/kl_per_token_untempered"] == pytest.approx(want, rel=1e-3)
    assert metrics["rollout/perplexity_untempered"] == pytest.approx(float((-own.mean()).exp()), rel=1e-4)
    assert metrics["rollout/perplexity_untempered"] > metrics["rollout/perplexity"]


def test_its_weights_make_the_mean_one_under_temperature_one() -> None:
    engine = engine_of(rollout__temperature=0.7, rollout__max_new_tokens=1)
    for i in range(3):
        engine.step(prompts(8, seed=i))
    roll = engine.rollout([prompts(1, seed=5)[0]] * 1000)
    own, ref = (x[:1] for x in both(engine, roll))
    want = float((own.exp() * (own - ref)).sum())
    metrics = experience_metrics(engine.experience(roll))
    assert metrics["objective/kl_per_token_untempered"] == pytest.approx(want, rel=0.3)


def test_at_temperature_one_there_is_nothing_besides() -> None:
    engine = engine_of()
    assert not [k for k in engine.step(prompts(4)).metrics if "untempered" in k]


# ---- rewards scaled by rolling returns -------------------------------------------------------------------------------


def rolled(earned: list[list[float]], gamma: float) -> list[float]:
    out = []
    for row in earned:
        total = 0.0
        for r in row:
            total = gamma * total + r
            out.append(total)
    return out


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_roll_over_each_response_alone(gamma: float) -> None:
    roll = tiny_engine().rollout(prompts(5))
    lengths = roll.lengths.tolist()
    scores = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0])
    ends = [[0.0] * (n - 1) + [s] for n, s in zip(lengths, scores.tolist(), strict=True)]
    got = rolling_returns(Scores(scores), roll, gamma)
    torch.testing.assert_close(got, torch.tensor(rolled(ends, gamma)))
    each = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0))
    got = rolling_returns(Scores(scores, each), roll, gamma)
    parts = [x.tolist() for x in each.split(lengths)]
    torch.testing.assert_close(got, torch.tensor(rolled(parts, gamma)))


def test_scores_are_divided_by_the_std_of_all_returns_so_far() -> None:
    engine = engine_of(reward__standardize="return", reward__clip=None, reward__missing_eos_penalty=None,
                       advantage__gamma=0.9)  # fmt: skip
    seen: list[float] = []
    for i in range(2):
        experience = engine.experience(engine.rollout(prompts(8, seed=i)))
        lengths = experience.rollout.lengths.tolist()
        ends = [[0.0] * (n - 1) + [s] for n, s in zip(lengths, experience.scores.tolist(), strict=True)]
        seen += rolled(ends, 0.9)
        std = float(torch.tensor(seen, dtype=torch.float64).std())
        torch.testing.assert_close(experience.shaped_scores, experience.scores / std, rtol=1e-5, atol=1e-6)
        assert experience.units == (0.0, pytest.approx(std))
        engine.update(experience)


# ---- repetition penalty ---------------------------------------------------------------------------------------------


def penalised(logits: Tensor, drawn: list[int], penalty: float) -> Tensor:
    out = logits.double().clone()
    for token in set(drawn):
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    return out


@torch.no_grad()
@pytest.mark.parametrize("cut", [{}, {"top_k": 6, "record_kept": True}, {"top_p": 0.9}])
def test_tokens_that_the_response_holds_are_made_less_likely(cut: dict[str, Any]) -> None:
    model, rows = tiny_policy(), prompts(6)
    sampling = Sampling(12, temperature=0.8, repetition_penalty=1.7, seed=3, **cut)
    given = decode(model, rows, range(6), sampling, eos_ids=[EOS])
    for prompt, response, logprobs in zip(rows, given.tokens, given.logprobs, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0]
        for t, (token, logprob) in enumerate(zip(response, logprobs, strict=True)):
            z = penalised(logits[len(prompt) + t - 1], response[:t], 1.7) / 0.8
            if "top_k" in cut:
                z[z < z.topk(6).values[-1]] = -torch.inf
            if "top_p" in cut:
                order = z.argsort(descending=True)
                mass = z[order].softmax(-1)
                z[order[mass.cumsum(-1) - mass >= 0.9]] = -torch.inf
            assert logprob == pytest.approx(float(z.log_softmax(-1)[token]), abs=1e-4)


def test_its_prompt_is_free_and_slots_do_not_matter() -> None:
    model, rows = tiny_policy(), prompts(7)
    given = [
        decode(model, rows, range(7), Sampling(12, repetition_penalty=3.0, slots=s), eos_ids=[EOS]) for s in (1, 2, 128)
    ]
    assert given[0].tokens == given[1].tokens == given[2].tokens
    plain = decode(model, rows, range(7), Sampling(12), eos_ids=[EOS])
    assert [r[0] for r in plain.tokens] == [r[0] for r in given[0].tokens]
    assert plain.tokens != given[0].tokens


def test_greedily_a_large_penalty_repeats_nothing() -> None:
    model = tiny_policy()
    sampling = Sampling(20, temperature=0.0, repetition_penalty=1e6)
    given = decode(model, prompts(4), range(4), sampling, eos_ids=[])
    # Tokens of logits below 0 are pushed down, those above 0 to 0: with some left above 0, none comes again.
    assert all(len(set(r)) == len(r) for r in given.tokens)


def test_it_needs_consent_since_the_ratio_leaves_it_out() -> None:
    with pytest.raises(ConfigError, match=r"rollout.repetition_penalty must be 1, or beside rollout.allow_biased"):
        small_config(rollout__repetition_penalty=1.1)
    with pytest.raises(ConfigError, match=r"rollout.repetition_penalty must be above 0"):
        small_config(rollout__repetition_penalty=0.0)
    with pytest.raises(RolloutError, match=r"repetition_penalty must be above 0 \(1: off\), got -1"):
        decode(tiny_policy(), prompts(1), [0], Sampling(4, repetition_penalty=-1.0), eos_ids=[EOS])
    engine = engine_of(rollout__repetition_penalty=1.5, rollout__allow_biased_sampling=True, loss__sampler_is_cap=2.0)
    metrics = engine.step(prompts(8)).metrics
    assert metrics["rollout/logprob_gap"] > 0.01
    assert metrics["val/first_ratio_gap"] == 0


# ---- a reference that follows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "hydra"])
def test_the_policy_becomes_the_reference_every_few_steps(mode: str) -> None:
    engine = engine_of(kl__refresh_every=2, **MODES[mode])
    gaps = []
    for i in range(5):
        roll = engine.rollout(prompts(8, seed=i))
        gaps.append(float((roll.logprobs - roll.ref_logprobs).abs().max()))
        engine.update(engine.experience(roll))
    assert [gap == 0 for gap in gaps] == [True, False, True, False, True]


@pytest.mark.parametrize("mode", ["full", "hydra"])
def test_a_checkpoint_holds_the_reference_of_its_time(mode: str, tmp_path) -> None:
    engine = engine_of(kl__refresh_every=2, **MODES[mode])
    for i in range(3):
        if i == 1:
            engine.save(tmp_path / "before")
        engine.step(prompts(8, seed=i))
    engine.save(tmp_path / "after")
    given = {"reward": tiny_reward(), ("policy" if mode == "hydra" else "reference"): tiny_policy()}
    loaded = Engine.load(tmp_path / "after", **given)
    rolls = [e.rollout(prompts(8, seed=9)) for e in (engine, loaded)]
    assert torch.equal(rolls[0].ref_logprobs, rolls[1].ref_logprobs)
    assert not torch.equal(rolls[0].ref_logprobs, rolls[0].logprobs)
    engine.restore(tmp_path / "before")
    roll = engine.rollout(prompts(8, seed=9))
    with torch.no_grad():
        want = log_softmaxes(tiny_policy(), roll, 1.0).gather(-1, roll.labels[:, None])[:, 0]
    torch.testing.assert_close(roll.ref_logprobs.double(), want, rtol=1e-4, atol=1e-5)


def test_adapters_have_no_reference_of_their_own_to_refresh() -> None:
    with pytest.raises(ConfigError, match=r"kl.refresh_every is set, but with model.train=lora"):
        small_config(kl__refresh_every=2, model__train="lora")
    with pytest.raises(ConfigError, match=r"kl.refresh_every must be at least 1 step"):
        small_config(kl__refresh_every=0)
