"""The checks that fix what PPO-max means here, one test each: nothing about speed, nothing about implementation."""

from __future__ import annotations

import dataclasses
import math

import ppomax_kernels as K
import pytest
import torch
from ppomax.config import ConfigError, load_config
from ppomax.data import Text
from ppomax.recipe.batch import cumulative, minibatch, split_minibatches
from ppomax.recipe.measures import experience_metrics
from ppomax.recipe.moments import RunningMoments
from ppomax.recipe.rewards import sequence_sums, shape_scores, token_rewards
from ppomax.recipe.update import critic_loss, policy_loss, train_minibatch
from ppomax.rollout.decode import stream_seeds

from tests.engine.tiny import VOCABULARY, prompts, small_config, tiny_engine

GRADIENT = 1e-5
FP32 = dict(rtol=1e-5, atol=1e-6)
SUMS = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def experience():
    engine = tiny_engine()
    experience = engine.experience(engine.rollout(prompts(8)))
    engine.take_up(experience)
    return engine, experience


def test_first_minibatch_has_ratio_one_and_old_values(experience) -> None:
    engine, exp = experience
    for micros in exp.rollout.micro_batches:
        for which in micros:
            micro = minibatch(exp, which)
            tokens = torch.tensor(float(len(micro.labels)))
            _, pg = policy_loss(engine.policy, micro, tokens, engine.config)
            clipped, v, gap = critic_loss(engine.critic, micro, tokens, engine.config)
            assert abs(float(pg["ratio_max"]) - 1) <= 1e-6
            assert abs(float(pg["ratio_mean"]) - 1) <= 1e-6
            assert float(gap) <= 1e-6
            unclipped = 0.5 * (micro.old_values - micro.returns).pow(2).mean()
            torch.testing.assert_close(clipped, unclipped, **FP32)
            assert float(v["clipfrac"]) == 0


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_equals_the_double_sum(lam: float, gamma: float) -> None:
    lengths = torch.tensor([1, 5, 2, 9])
    cu = cumulative(lengths)
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(17, generator=generator), torch.randn(17, generator=generator)
    advantages, returns = K.gae(rewards, values, cu, gamma=gamma, lam=lam, impl="ref")
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        r, v = rewards[start:end].double(), torch.cat([values[start:end].double(), torch.zeros(1)])
        n = end - start
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        want = torch.stack([sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)])
        torch.testing.assert_close(advantages[start:end].double(), want, **SUMS)
        if lam == 1.0:  # Monte-Carlo return
            mc = torch.stack([sum(gamma**k * r[t + k] for k in range(n - t)) for t in range(n)])
            torch.testing.assert_close(returns[start:end].double(), mc, **SUMS)
        if lam == 0.0:  # one-step TD
            torch.testing.assert_close(returns[start:end].double(), r + gamma * v[1:], **SUMS)


@pytest.mark.parametrize("cuts", [[], [10], [1, 2, 3], [5, 50, 51], list(range(1, 100))])
def test_running_moments_do_not_depend_on_the_split(cuts: list[int]) -> None:
    scores = torch.randn(100, generator=torch.Generator().manual_seed(1)) * 3 + 50
    moments = RunningMoments()
    for part in torch.tensor_split(scores, cuts):
        moments = moments.with_scores(part)
    assert moments.mean == pytest.approx(float(scores.double().mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(scores.double().std()), rel=1e-10)


@pytest.mark.parametrize("micro_tokens", [1, 40, 10_000])
def test_gradient_does_not_depend_on_micro_batches(experience, micro_tokens: int) -> None:
    engine, exp = experience
    assert_same_gradient(_gradients(engine, exp, micro_tokens, 1), _gradients(engine, exp, 90, 1))


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradient_does_not_depend_on_ranks(experience, ranks: int) -> None:
    """Each rank holds some of the sequences and divides by the global token count; the sum over ranks is the
    gradient."""
    engine, exp = experience
    assert_same_gradient(_gradients(engine, exp, 90, ranks), _gradients(engine, exp, 90, 1))


def assert_same_gradient(got: torch.Tensor, want: torch.Tensor) -> None:
    """To float32 rounding of sums taken in another order, against the whole gradient's size."""
    assert float((got - want).norm()) <= GRADIENT * float(want.norm())


def _gradients(engine, exp, micro_tokens: int, ranks: int) -> torch.Tensor:
    lengths = exp.rollout.cu_seqlens.diff()
    tokens = torch.tensor(float(len(exp.rollout.states)))
    for rank in range(ranks):
        mine = torch.arange(rank, len(lengths), ranks)
        for micro in split_minibatches(lengths[mine], len(mine), micro_tokens, None)[0]:
            part = minibatch(exp, mine[micro])
            engine.policy.backward(policy_loss(engine.policy, part, tokens, engine.config)[0])
            engine.critic.backward(critic_loss(engine.critic, part, tokens, engine.config)[0])
    grads = torch.cat(
        [p.grad.flatten() for t in (engine.policy, engine.critic) for p in t.params if p.grad is not None]
    )
    for trained in (engine.policy, engine.critic):
        for p in trained.params:
            p.grad = None
    return grads


def test_result_does_not_depend_on_the_order_of_prompts() -> None:
    """No padding side exists; what is left of it is the place in the batch."""
    given = prompts(8)
    engine = tiny_engine()
    forward = engine._generate(given, range(8), None)
    back = engine._generate(given[::-1], range(7, -1, -1), None)
    assert forward.sequences() == back.sequences()[::-1]
    per_sequence = sequence_sums(forward.logprobs, forward.response_cu)
    torch.testing.assert_close(per_sequence, sequence_sums(back.logprobs, back.response_cu).flip(0), **SUMS)


def test_kl_estimates_average_to_the_exact_kl_only_without_truncated_sampling() -> None:
    generator = torch.Generator().manual_seed(3)
    policy, reference = torch.randn(VOCABULARY, generator=generator), torch.randn(VOCABULARY, generator=generator)
    log_p, log_q = torch.log_softmax(policy, 0), torch.log_softmax(reference, 0)
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    count = 50_000
    seeds = stream_seeds(0, range(count))

    def mean(estimator: str, top_p: float) -> tuple[float, float]:
        token, *_ = K.sample(policy.repeat(count, 1), seeds, torch.zeros_like(seeds), top_p=top_p, impl="ref")
        kl = K.kl_penalty(log_p[token], log_q[token], estimator=estimator, impl="ref")
        return float(kl.mean()), float(kl.std()) / math.sqrt(count)

    for estimator in ("k1", "k3"):
        estimate, error = mean(estimator, 1.0)
        assert abs(estimate - exact) < 5 * error
    biased, error = mean("k1", 0.5)
    assert abs(biased - exact) > 20 * error


def test_reward_composition(experience) -> None:
    _, exp = experience
    roll = exp.rollout
    u = sequence_sums(roll.logprobs - roll.ref_logprobs, roll.response_cu)
    torch.testing.assert_close(
        sequence_sums(exp.rewards, roll.response_cu), exp.shaped_scores - exp.kl_coef * u, **SUMS
    )


def test_score_sits_on_the_last_token_of_each_length(experience) -> None:
    _, exp = experience
    shaped = torch.arange(1.0, len(exp.scores) + 1)
    rewards = token_rewards(shaped, exp.rollout, 0.0, "k1", "ref")
    want = torch.zeros_like(rewards)
    want[exp.rollout.response_cu[1:].long() - 1] = shaped
    torch.testing.assert_close(rewards, want, rtol=0, atol=0)
    assert len(set(exp.rollout.lengths.tolist())) > 1


def test_kl_is_outside_the_clip() -> None:
    """Scores are clipped before the KL penalty is added, and the penalty for a missing EOS is not clipped either."""
    config = small_config(reward__clip=0.5, reward__missing_eos_penalty=2.0, reward__standardize="none").reward
    shaped = shape_scores(torch.tensor([9.0, -9.0, 0.1]), torch.tensor([True, True, False]), RunningMoments(), config)
    torch.testing.assert_close(shaped, torch.tensor([0.5, -0.5, -1.9]))


def test_reward_clip_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.clip .*0 would erase every reward"):
        load_config(overrides={"reward.clip": 0})


def test_ptx_and_policy_losses_make_one_optimiser_step() -> None:
    asked: list[int] = []

    def texts(count: int) -> list[Text]:
        asked.append(count)
        return [Text([1, 5, 6, 7], 1)] * count

    engine = tiny_engine(small_config(ptx__coef=1.0, ptx__batch_size=3), texts=texts)
    exp = engine.experience(engine.rollout(prompts(8)))
    calls: list[str] = []
    plain = engine.policy.optimizer.step
    engine.policy.optimizer.step = lambda *a: (calls.append("step"), plain(*a))[1]  # type: ignore[method-assign]
    before = engine.policy.steps
    micros = [minibatch(exp, m) for m in exp.rollout.micro_batches[0]]
    row = train_minibatch(engine.policy, engine.critic, micros, engine.config, engine.health, texts)
    assert calls == ["step"]
    assert engine.policy.steps == before + 1
    assert asked == [3]
    assert row["loss/ptx_avg"] > 0


def test_resumed_step_is_bit_identical(tmp_path) -> None:
    left_alone, resumed = tiny_engine(), tiny_engine()
    left_alone.step(prompts(8))
    left_alone.save(tmp_path / "state")
    resumed.restore(tmp_path / "state")
    a, b = left_alone.step(prompts(8, seed=1)).metrics, resumed.step(prompts(8, seed=1)).metrics
    timed = {k for k in a if k.startswith(("time/", "perf/"))}
    assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    for mine, theirs in ((left_alone.policy, resumed.policy), (left_alone.critic, resumed.critic)):
        assert all(torch.equal(p, q) for p, q in zip(mine.params, theirs.params, strict=True))


@pytest.mark.parametrize("length", [3, 10])
def test_perplexity_of_a_uniform_model_is_its_vocabulary(length: int) -> None:
    engine = tiny_engine(small_config(rollout__max_new_tokens=length))
    with torch.no_grad():
        engine.policy.module.get_output_embeddings().weight.zero_()
    metrics = experience_metrics(engine.experience(engine.rollout(prompts(8))), "ref")
    assert metrics["rollout/perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    assert metrics["policy/entropy_avg"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)


def test_experience_is_frozen(experience) -> None:
    _, exp = experience
    with pytest.raises(dataclasses.FrozenInstanceError):
        exp.kl_coef = 1.0
