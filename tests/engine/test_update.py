"""The update: each switch does what its formula says, bad numbers are skipped, policy and critic do not clip each
other."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ppomax.config import AdvantageConfig, ConfigError, OptimConfig
from ppomax.data import Text
from ppomax.engine import Engine
from ppomax.models import head_of, packed_hidden
from ppomax.recipe.batch import Experience, cumulative, minibatch, pack, select, spans, split_minibatches
from ppomax.recipe.rewards import advantages_and_returns
from ppomax.recipe.update import Diverged, Health, critic_loss, policy_loss, prepared, ptx_backward
from ppomax.sharding import Trained, lr_at

from tests.engine.tiny import prompts, small_config, tiny_engine

LOSS = dict(rtol=1e-5, atol=1e-6)
SAME = 1e-5


def moved_engine(**knobs: object) -> tuple[Engine, Experience]:
    """An engine whose policy and critic have moved away from what scored the buffer, so that ratios differ from 1."""
    engine = tiny_engine(small_config(**knobs))
    experience = engine.experience(engine.rollout(prompts(8)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*engine.policy.params, *engine.critic.params]:
            p.add_(torch.randn(p.shape, generator=generator) * 0.03)
    return engine, experience


def eager_terms(engine: Engine, exp: Experience) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprobs, entropy, values of the moved models, and u, in plain torch over the whole buffer."""
    roll = exp.rollout
    hidden = packed_hidden(engine.policy.module, roll.tokens, roll.cu_seqlens)[roll.states]
    log_p = torch.log_softmax(head_of(engine.policy.module).logits(hidden) / engine.config.rollout.temperature, -1)
    logprobs = log_p.gather(1, roll.labels[:, None])[:, 0]
    values = engine.critic.module(roll.tokens, roll.cu_seqlens)[roll.states]
    return logprobs, -(log_p.exp() * log_p).sum(-1), values, logprobs - roll.ref_logprobs


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"loss__clip_high": 0.28},
        {"loss__clip_low": 0.05, "loss__clip_high": 0.05, "loss__dual_clip": 1.2},
        {"loss__ent_coef": 0.1},
        {"kl__loss_coef": 0.3, "kl__loss_estimator": "k2"},
        {"loss__value_clip": None, "loss__vf_coef": 0.5},
        {"loss__value_clip": 0.01},
        {"rollout__temperature": 0.7},
        {"loss__sampler_is_cap": 1.5},
        {"loss__clip_low": None, "loss__clip_high": None},
        {"loss__ratio_to": "reference"},
        {"loss__ent_coef": 0.1, "loss__ent_target": 9.0},
        {"loss__ent_coef": 0.1, "loss__ent_target": 0.5},
        {"advantage__whiten": True, "advantage__clip": 0.3, "advantage__over": "minibatch"},
    ],
)
def test_losses_are_their_formulas(knobs: dict[str, object]) -> None:
    engine, exp = moved_engine(**knobs)
    config, roll = engine.config.loss, exp.rollout
    logprobs, entropy, values, u = eager_terms(engine, exp)
    old = roll.ref_logprobs if config.ratio_to == "reference" else roll.logprobs
    ratio, a = (logprobs - old).exp(), exp.advantages.double()
    if engine.config.advantage.over == "minibatch":
        a = ((a - a.mean()) / a.std(unbiased=False)).clamp(-0.3, 0.3)
    a, surrogate = a.float(), -a.float() * ratio
    if config.clip_low is not None and config.clip_high is not None:
        surrogate = torch.maximum(surrogate, -a * ratio.clamp(1 - config.clip_low, 1 + config.clip_high))
    if config.dual_clip:
        surrogate = torch.where(a < 0, torch.minimum(surrogate, -a * config.dual_clip), surrogate)
    if config.sampler_is_cap:
        surrogate = surrogate * (roll.logprobs - roll.sampler_logprobs).exp().clamp(max=config.sampler_is_cap)
    bonus = entropy.mean()
    if config.ent_target is not None:
        bonus = -(bonus - config.ent_target).abs()
        bonus = bonus + config.ent_target * (1 if entropy.mean() < config.ent_target else -1)  # the constant left out
    want = surrogate.mean() - config.ent_coef * bonus + engine.config.kl.loss_coef * (0.5 * u * u).mean()
    squared = (values - exp.returns) ** 2
    if config.value_clip is not None:
        clipped = roll.values + (values - roll.values).clamp(-config.value_clip, config.value_clip)
        squared = torch.maximum(squared, (clipped - exp.returns) ** 2)
    want_v = config.vf_coef * 0.5 * squared.mean()
    [whole] = prepared([minibatch(exp, torch.arange(8))], engine.config)
    tokens = torch.tensor(float(len(whole.labels)))
    got, metrics = policy_loss(engine.policy, whole, tokens, engine.config)
    got_v, _, _ = critic_loss(engine.critic, whole, tokens, engine.config)
    torch.testing.assert_close(got, want, **LOSS)
    torch.testing.assert_close(got_v, want_v, **LOSS)
    assert abs(float(metrics["ratio_max"]) - float(ratio.detach().max())) < SAME * float(ratio.detach().max())
    assert float(metrics["ratio_gap"]) == pytest.approx(float((ratio.detach() - 1).abs().max()), rel=1e-4)
    assert_same_gradients(engine, (got, want), (got_v, want_v))


def assert_same_gradients(engine: Engine, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for trained, (got, want) in zip((engine.policy, engine.critic), pairs, strict=True):
        a = torch.autograd.grad(got, trained.params, retain_graph=True, allow_unused=True)
        b = torch.autograd.grad(want, trained.params, retain_graph=True, allow_unused=True)
        x, y = (torch.cat([g.flatten() for g in grads if g is not None]) for grads in (a, b))
        assert float((x - y).norm()) <= SAME * float(y.norm())


def test_fused_and_reference_updates_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whole update on each back-end: the same metrics, the same gradients in every optimiser step of both models,
    and weights that moved alike."""
    knobs = {"ptx__coef": 0.2, "loss__ent_coef": 0.01, "batch__epochs": 2}
    rows, moves, gradients = [], [], {}
    step = Trained.step
    for impl in ("ref", "auto"):
        taken = gradients.setdefault(impl, [])

        def recorded(trained: Trained, norm: torch.Tensor, lr: float | None = None, taken: list = taken) -> None:
            taken.append(torch.cat([p.grad.flatten().clone() for p in trained.params if p.grad is not None]))
            step(trained, norm, lr)

        monkeypatch.setattr(Trained, "step", recorded)
        engine = tiny_engine(small_config(impl=impl, **knobs), texts=lambda n: [Text([1, 5, 6, 7, 8], 2)] * n)
        params = [*engine.policy.params, *engine.critic.params]
        before = torch.cat([p.detach().clone().flatten() for p in params])
        rows.append(engine.step(prompts(8)).metrics)
        moves.append(torch.cat([p.detach().flatten() for p in params]) - before)
    for key in ("loss/policy_avg", "loss/policy_total", "loss/value_avg",
                "loss/ptx_avg", "policy/grad_norm", "critic/grad_norm",
                "objective/kl_per_token", "policy/entropy_avg", "val/ratio_max"):  # fmt: skip
        assert rows[0][key] == pytest.approx(rows[1][key], rel=SAME, abs=SAME), key
    assert len(gradients["ref"]) == len(gradients["auto"]) == 8  # 2 epochs of 2 minibatches, two models
    for ref, fused in zip(gradients["ref"], gradients["auto"], strict=True):
        assert float((fused - ref).norm()) <= SAME * float(ref.norm())
    assert float(moves[0].norm()) > 0
    assert float((moves[1] - moves[0]).norm()) <= 1e-4 * float(moves[0].norm())


def test_first_minibatch_gaps_are_reported_as_zero() -> None:
    metrics = tiny_engine(small_config(batch__epochs=2)).step(prompts(8)).metrics
    assert metrics["val/first_ratio_gap"] <= 1e-6
    assert metrics["val/first_value_gap"] <= 1e-6
    assert metrics["val/ratio_max"] > 1.0


def test_a_first_ratio_below_one_shows_as_much_as_one_above() -> None:
    engine = tiny_engine(small_config())
    experience = engine.experience(engine.rollout(prompts(8)))
    roll = dataclasses.replace(experience.rollout, logprobs=experience.rollout.logprobs + math.log(1 / 0.6))
    metrics = engine.update(dataclasses.replace(experience, rollout=roll))
    assert metrics["val/first_ratio_gap"] == pytest.approx(0.4, abs=1e-3)


def test_not_a_number_skips_the_step_counts_and_stops() -> None:
    engine = tiny_engine(small_config(run__max_bad_steps=4))
    good = engine.experience(engine.rollout(prompts(8)))
    bad = dataclasses.replace(good, advantages=torch.full_like(good.advantages, math.nan))
    before = [p.detach().clone() for p in [*engine.policy.params, *engine.critic.params]]
    metrics = engine.update(bad)
    assert metrics["val/skipped"] == 2
    assert engine.health.skipped == 2
    assert all(torch.equal(p, q) for p, q in zip(before, [*engine.policy.params, *engine.critic.params], strict=True))
    assert engine.policy.steps == 2
    engine.update(good)
    assert engine.health.in_a_row == 0
    assert not torch.equal(before[0], engine.policy.params[0])
    engine.update(bad)
    with pytest.raises(Diverged, match="4 optimiser steps in a row"):
        engine.update(bad)


def test_infinite_returns_are_caught_too() -> None:
    engine = tiny_engine()
    good = engine.experience(engine.rollout(prompts(8)))
    assert engine.update(dataclasses.replace(good, returns=torch.full_like(good.returns, math.inf)))["val/skipped"] == 2


def test_a_good_step_after_bad_ones_clears_the_count() -> None:
    health = Health()
    for good in (False, False, True, False):
        health.note(good, 3)
    assert (health.skipped, health.in_a_row) == (3, 1)


def test_critic_gradient_does_not_shrink_the_policy_step() -> None:
    """Clipped apart: value targets a thousand times larger leave the policy's new weights as they were."""
    new = []
    for factor in (1.0, 1000.0):
        engine = tiny_engine()
        exp = engine.experience(engine.rollout(prompts(8)))
        engine.update(dataclasses.replace(exp, returns=exp.returns * factor))
        new.append(torch.cat([p.detach().flatten() for p in engine.policy.params]))
    assert torch.equal(new[0], new[1])


def test_joint_clip_is_that_of_one_optimiser_over_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[bool, list[torch.Tensor]] = {}
    for joint in (False, True):
        engine = tiny_engine(small_config(loss__joint_grad_clip=joint, batch__minibatch_size=8))
        norms = taken.setdefault(joint, [])
        for part in (engine.policy, engine.critic):
            monkeypatch.setattr(part, "step", lambda norm, norms=norms: norms.append(norm))
        metrics = engine.step(prompts(8)).metrics
        assert metrics["policy/grad_norm"] == pytest.approx(float(taken[False][0]))
    policy, critic = taken[False]
    assert taken[True][0] == taken[True][1]
    assert float(taken[True][0]) == pytest.approx(math.hypot(float(policy), float(critic)))


def test_joint_clip_is_refused_where_deepspeed_clips() -> None:
    with pytest.raises(ConfigError, match=r"loss\.joint_grad_clip.*ZeRO stage 2 clips each"):
        tiny_engine(small_config(loss__joint_grad_clip=True, sharding__zero_stage=2))


@pytest.mark.parametrize(("limit", "epochs"), [(None, 3), (1e9, 3), (1e-12, 1)])
def test_epochs_end_once_the_kl_to_the_buffers_policy_is_too_large(limit: float | None, epochs: int) -> None:
    engine = tiny_engine(small_config(batch__kl_stop=limit, batch__epochs=3))
    assert engine.step(prompts(8)).metrics["val/epochs"] == epochs
    assert engine.policy.steps == epochs * 2


def test_gradient_norm_is_clipped() -> None:
    module = torch.nn.Linear(4, 4)
    trained = Trained(module, OptimConfig(lr=1.0, grad_clip=0.5), 10)
    trained.backward((module.weight * 100).sum())
    norm = trained.grad_norm()
    assert float(norm) == pytest.approx(400.0)
    seen: list[float] = []
    plain = trained.optimizer.step
    trained.optimizer.step = lambda: (seen.append(float(trained.grad_norm())), plain())[1]  # type: ignore[method-assign, misc]
    trained.step(norm)
    assert seen == [pytest.approx(0.5, rel=1e-4)]


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("inverse_sqrt", {0: 0.1, 4: 0.5, 9: 1.0, 39: 0.5, 99: math.sqrt(0.1)}),
        ("constant", {0: 0.1, 9: 1.0, 50: 1.0, 99: 1.0}),
        ("linear", {9: 1.0, 54: 0.55, 99: 0.1}),
        ("cosine", {9: 1.0, 54: 0.55, 99: 0.1}),
    ],
)
def test_learning_rate_schedules(schedule: str, want: dict[int, float]) -> None:
    config = OptimConfig(lr=2.0, warmup=0.1, schedule=schedule, min_ratio=0.1)  # type: ignore[arg-type]
    for step, multiple in want.items():
        assert lr_at(step, 100, config) == pytest.approx(2.0 * multiple)


def test_inverse_sqrt_without_warm_up_starts_whole_and_ends_as_with_one() -> None:
    config = OptimConfig(lr=2.0, warmup=0.0)
    for steps in (20, 1000):
        rates = [lr_at(step, steps, config) for step in range(steps)]
        assert rates[0] == 2.0
        assert rates == sorted(rates, reverse=True)
        assert rates[steps // 10] == pytest.approx(2.0 * math.sqrt(0.5))
        assert rates[-1] == pytest.approx(lr_at(steps - 1, steps, OptimConfig(lr=2.0, warmup=0.1)), rel=0.06)


def test_sixteen_bit_weights_move_by_less_than_their_rounding() -> None:
    module = torch.nn.Linear(4, 4, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.fill_(1.0)
    trained = Trained(module, OptimConfig(lr=1e-4, warmup=0.0, schedule="constant"), 100)
    for _ in range(50):  # 50 steps of 1e-4: bf16's spacing at 1 is 4e-3, so single steps would be lost
        trained.backward(module.weight.sum())
        trained.step(trained.grad_norm())
    assert float(module.weight.detach()[0, 0]) == pytest.approx(1 - 50e-4, abs=2e-3)


def test_ptx_is_the_mean_nll_of_the_marked_tokens() -> None:
    texts = [Text([1, 5, 6, 7, 8], 1), Text([1, 9, 10], 2), Text([1, 11], 1)]
    engine = tiny_engine(small_config(ptx__coef=0.5, ptx__batch_size=3, batch__micro_tokens=6), texts=lambda n: texts)
    loss = ptx_backward(engine.policy, engine.config, lambda n: texts, torch.device("cpu"))
    got = torch.cat([p.grad.flatten() for p in engine.policy.params if p.grad is not None])
    engine.policy.skip()
    nll = []
    for text in texts:
        logits = engine.policy.module(torch.tensor([text.tokens])).logits[0]
        nll += [-torch.log_softmax(logits[i - 1], -1)[text.tokens[i]] for i in range(text.loss_from, len(text.tokens))]
    want = 0.5 * torch.stack(nll).mean()
    want.backward()
    torch.testing.assert_close(loss, want.detach(), **LOSS)
    grads = torch.cat([p.grad.flatten() for p in engine.policy.params if p.grad is not None])
    assert float((got - grads).norm()) <= SAME * float(grads.norm())


def test_actor_and_critic_lambdas_whitening_and_clipping() -> None:
    engine = tiny_engine()
    exp = engine.experience(engine.rollout(prompts(8)))
    roll = exp.rollout

    def of(**knobs: object) -> tuple[torch.Tensor, torch.Tensor]:
        return advantages_and_returns(exp.rewards, roll, AdvantageConfig(**knobs), "ref")  # type: ignore[arg-type]

    actor, critic = of(lam=0.3, critic_lam=1.0)
    torch.testing.assert_close(actor, of(lam=0.3)[0], rtol=0, atol=0)
    torch.testing.assert_close(critic, of(lam=1.0)[1], rtol=0, atol=0)
    white, _ = of(whiten=True)
    assert abs(float(white.mean())) < 1e-5
    assert float(white.std(unbiased=False)) == pytest.approx(1, rel=1e-4)
    clipped, _ = of(whiten=True, clip=0.3)
    torch.testing.assert_close(clipped, white.clamp(-0.3, 0.3), rtol=0, atol=0)


def test_length_adaptive_lambda_is_per_sequence_and_not_negative() -> None:
    engine = tiny_engine()
    exp = engine.experience(engine.rollout(prompts(8)))
    roll = exp.rollout
    got, _ = advantages_and_returns(exp.rewards, roll, AdvantageConfig(length_alpha=0.2), "ref")
    for i, length in enumerate(roll.lengths.tolist()):
        lam = max(0.0, 1 - 1 / (0.2 * length))
        part = slice(int(roll.response_cu[i]), int(roll.response_cu[i + 1]))
        alone, _ = advantages_and_returns(exp.rewards, roll, AdvantageConfig(lam=lam), "ref")
        torch.testing.assert_close(got[part], alone[part], rtol=1e-4, atol=1e-5)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.integers(1, 8),
    st.integers(1, 60),
    st.booleans(),
    st.booleans(),
)
def test_plans_hold_each_sequence_once_within_the_budget(
    lengths: list[int], size: int, budget: int, shuffle: bool, padded: bool
) -> None:
    generator = torch.Generator().manual_seed(0) if shuffle else None
    plan = split_minibatches(torch.tensor(lengths), size, budget, generator, padded=padded)
    assert sorted(i for mb in plan for micro in mb for i in micro.tolist()) == list(range(len(lengths)))
    assert all(sum(len(m) for m in mb) == size for mb in plan[:-1])
    for micro in (m for mb in plan for m in mb):
        held = [lengths[i] for i in micro.tolist()]
        assert len(micro) == 1 or (len(held) * max(held) if padded else sum(held)) <= budget


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_packing_anew_keeps_each_sequence(lengths: list[int], rng) -> None:
    rows = [[i * 10 + t for t in range(n)] for i, n in enumerate(lengths)]
    tokens, cu = pack(rows)
    which = torch.tensor(rng.sample(range(len(rows)), rng.randint(1, len(rows))))
    at, new_cu = spans(cu, which)
    assert tokens[at].tolist() == [x for i in which.tolist() for x in rows[i]]
    assert torch.equal(new_cu, cumulative(torch.tensor([lengths[i] for i in which.tolist()])))


def test_selected_states_still_point_before_their_tokens() -> None:
    engine = tiny_engine()
    roll = engine.rollout(prompts(8))
    which = torch.tensor([5, 0, 3])
    tokens, cu, states, slots = select(roll, which)
    assert torch.equal(tokens[states + 1], roll.labels[slots])
    want = [t for i in which.tolist() for half in roll.sequences()[i] for t in half]
    assert tokens.tolist() == want
    assert int(cu[-1]) == len(tokens)
