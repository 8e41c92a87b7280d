"""The engine and the training stage: rollouts that do not depend on batching, odd prompts, stages, monitors."""

from __future__ import annotations

import json

import ppomax
import pytest
import torch
from ppomax.config import ConfigError, load_config
from ppomax.data import DataError, Text, load_prompts
from ppomax.reporting.monitor import RunMonitor
from ppomax.stages.order import Order
from ppomax.stages.ppo import differences, train_ppo
from ppomax.stages.pretrain_critic import pretrain_critic
from transformers import AutoModelForCausalLM

from tests.engine.sampled import decode
from tests.engine.tiny import BOS, EOS, SMALL, prompts, small_config, tiny_assets, tiny_engine, tiny_policy
from tests.engine.tiny_text import CHAT_TEMPLATE, tiny_llama
from tests.engine.tiny_text import tiny_tokenizer as tiny_text_tokenizer

GIVEN = prompts(9)


def test_public_names_load_late() -> None:
    assert ppomax.Engine.__name__ == "Engine"
    assert ppomax.load_config is load_config
    with pytest.raises(AttributeError, match="no attribute 'engin'"):
        ppomax.engin  # noqa: B018


@pytest.mark.parametrize("slots", [1, 4, 9])
def test_greedy_tokens_equal_generate(slots: int) -> None:
    model = tiny_policy().eval()
    got = decode(model, GIVEN, range(9), eos_ids=[EOS], max_new_tokens=12, temperature=0, slots=slots, impl="ref")
    for prompt, response in zip(GIVEN, got.tokens, strict=True):
        want = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert response == want.tolist()


def test_sampled_tokens_do_not_depend_on_the_batch() -> None:
    model = tiny_policy().eval()
    options = dict(eos_ids=[EOS], max_new_tokens=12, seed=3, impl="ref")
    whole = decode(model, GIVEN, range(9), **options)
    for i in range(9):
        alone = decode(model, [GIVEN[i]], [i], **options)
        assert alone.tokens == [whole.tokens[i]]
        assert alone.finished == [whole.finished[i]]
    assert decode(model, GIVEN, range(9), **{**options, "seed": 4}).tokens != whole.tokens
    assert len({tuple(t) for t in decode(model, [GIVEN[0]] * 9, range(9), **options).tokens}) > 5


def test_recorded_logprobs_equal_the_packed_forward() -> None:
    roll = tiny_engine(small_config(rollout__temperature=0.8)).rollout(GIVEN)
    torch.testing.assert_close(roll.logprobs, roll.sampler_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        roll.logprobs, roll.ref_logprobs, rtol=0, atol=1e-6
    )  # the reference is the policy's start


def test_lengths_ends_and_minimum() -> None:
    model = tiny_policy().eval()
    model.get_output_embeddings().weight.data[EOS] = 0
    hidden_first = decode(model, GIVEN, range(9), eos_ids=list(range(64)), max_new_tokens=5, impl="ref")
    assert [len(t) for t in hidden_first.tokens] == [1] * 9  # every token ends: empty responses
    assert all(hidden_first.finished)
    never = decode(model, GIVEN, range(9), eos_ids=[], max_new_tokens=5, impl="ref")
    assert [len(t) for t in never.tokens] == [5] * 9
    assert not any(never.finished)
    late = decode(
        tiny_policy().eval(), GIVEN * 4, range(36), eos_ids=[EOS], max_new_tokens=8, min_new_tokens=4, impl="ref"
    )
    assert min(len(t) for t in late.tokens) > 4
    assert any(late.finished)


@pytest.mark.parametrize("eos", [list(range(64)), []])
def test_all_empty_and_all_truncated_responses_train(eos: list[int]) -> None:
    engine = tiny_engine()
    engine.eos_ids = eos
    metrics = engine.step(prompts(8)).metrics
    assert metrics["rollout/length"] == (1 if len(eos) > 1 else 10)
    assert metrics["rollout/truncated"] == (0 if len(eos) > 1 else 1)
    assert metrics["val/skipped"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no prompts were given"),
        ([[BOS], []], "prompt 1 is empty"),
        ([[BOS] * 119], r"prompt 0 has 119 tokens; .* window of 128"),
        ([[BOS, 64]], r"prompt 0 has token id 64 .* 0\.\.63"),
        (["text"], "text prompts need a tokenizer"),
    ],
)
def test_bad_prompts_are_named(given: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_engine().rollout(given)


def test_prompt_at_the_length_limit_runs() -> None:
    roll = tiny_engine(small_config(batch__rollout_size=4)).rollout([[BOS] * 118, [BOS]])
    assert int(roll.cu_seqlens[-1]) == len(roll.tokens)


def test_preview_leaves_no_trace() -> None:
    a, b = tiny_engine(), tiny_engine()
    first, _ = a.preview(GIVEN)
    again, _ = a.preview(GIVEN)
    assert first.sequences() == again.sequences()
    assert a.step(prompts(8)).metrics["loss/policy_avg"] == b.step(prompts(8)).metrics["loss/policy_avg"]


def test_ptx_without_texts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ptx\.coef is 0\.1 but there are no texts"):
        tiny_engine(small_config(ptx__coef=0.1))


def test_two_engines_do_not_see_each_other() -> None:
    a, b = tiny_engine(), tiny_engine()
    alone = tiny_engine().step(prompts(8)).metrics
    a.step(prompts(8, seed=5))
    assert b.step(prompts(8)).metrics["loss/policy_avg"] == alone["loss/policy_avg"]


def test_steps_raise_an_easy_reward() -> None:
    """Reward for one word: its share must grow, or nothing was learned."""
    from tests.engine.tiny import tiny_tokenizer

    def count(asked: list[str], given: list[str]) -> list[float]:
        return [g.split().count("w9") / max(1, len(g.split())) for g in given]

    config = small_config(
        model__critic="policy",
        policy_optim__lr=5e-3,
        critic_optim__lr=5e-3,
        batch__rollout_size=32,
        batch__minibatch_size=8,
        policy_optim__warmup=0.0,
        kl__coef=0.0,
        batch__micro_tokens=4096,
    )
    engine = tiny_engine(config, reward=count, tokenizer=tiny_tokenizer())
    scores = [engine.step(prompts(32)).metrics["objective/scores"] for _ in range(12)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.05


def test_critic_pretraining_freezes_the_policy_and_learns() -> None:
    engine = tiny_engine(
        small_config(critic__pretrain_epochs=4, batch__rollout_size=32, batch__micro_tokens=4096, critic_optim__lr=3e-3)
    )
    before = [p.detach().clone() for p in engine.policy.params]
    rows = [pretrain_critic(engine, prompts(32, seed=s))[0] for s in range(5)]
    assert all(torch.equal(p, q) for p, q in zip(before, engine.policy.params, strict=True))
    assert rows[-1]["pretrain/explained_var"] > rows[0]["pretrain/explained_var"] + 0.1
    assert engine.critic.steps == 0  # the schedule has not moved


def test_critic_pretraining_stops_at_its_target() -> None:
    engine = tiny_engine(small_config(critic__pretrain_explained_variance=-1e9))
    before = [p.detach().clone() for p in engine.critic.params]
    metrics, ready = pretrain_critic(engine, prompts(8))
    assert ready
    assert "pretrain/value_loss" not in metrics
    assert all(torch.equal(p, q) for p, q in zip(before, engine.critic.params, strict=True))


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, object]:
    return tiny_assets(tmp_path_factory.mktemp("assets"))


def config_of(names: dict[str, object], out, **knobs: object):
    return load_config(
        overrides={**SMALL, **names, "run.out": str(out), **{k.replace("__", "."): v for k, v in knobs.items()}}
    )


def test_train_ppo_leaves_a_whole_run(names, tmp_path) -> None:
    config = config_of(
        names, tmp_path / "run", monitor__samples_every=2, ptx__coef=0.1, ptx__pool=8, run__keep_checkpoints=2
    )
    out = train_ppo(config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    wanted = {
        "objective/scores",
        "objective/kl",
        "objective/kl_per_token",
        "objective/entropy",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "loss/policy_avg",
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/ratio",
        "lr",
        "episode",
        "rollout/perplexity",
        "rollout/ref_perplexity",
        "rollout/distinct_2",
        "rollout/truncated",
        "rollout/length",
        "val/explained_var",
        "policy/grad_norm",
        "critic/grad_norm",
        "time/rollout",
        "time/update",
        "objective/scores_p99",
    }
    assert wanted <= rows[-1].keys()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {s["step"] for s in samples} == {0, 2, 4}
    assert {"prompt", "response", "score", "length", "finished"} <= samples[0].keys()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    AutoModelForCausalLM.from_pretrained(out / "policy")
    assert load_config(out / "config.yaml") == config
    with pytest.raises(ConfigError, match=r"holds checkpoints of a run; set run\.resume=true"):
        train_ppo(config)


class Halts(RunMonitor):
    asked = "stop"

    def log(self, step, metrics):
        super().log(step, metrics)
        return self.asked if step == 2 else None


@pytest.mark.parametrize(("halt", "last"), [("stop", "step-000002"), ("rollback", "step-000001")])
def test_monitor_ends_a_run(names, tmp_path, halt: str, last: str) -> None:
    config = config_of(names, tmp_path / "run")
    monitor = Halts(tmp_path, config)
    monitor.asked = halt
    out = train_ppo(config, monitor)
    assert sorted(p.name for p in (out / "checkpoints").iterdir())[-1] == last
    assert (out / "policy" / "config.json").is_file()


def test_named_models_need_reward_and_prompts(names, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"model\.reward_model or reward\.function"):
        train_ppo(config_of({**names, "model.reward_model": None}, tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"data\.prompts"):
        train_ppo(config_of({**names, "data.prompts": None}, tmp_path / "b"))


def test_train_with_a_reward_function_and_samples_per_prompt(names, tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def f(prompts, responses):\n    return [float(len(r)) for r in responses]\n", encoding="utf-8")
    config = config_of(
        {**names, "model.reward_model": None},
        tmp_path / "run",
        reward__function=f"{path}:f",
        run__steps=1,
        model__critic="policy",
        rollout__samples_per_prompt=4,
    )
    out = train_ppo(config)
    assert json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["episode"] == 16


def test_prompt_order_is_endless_and_known_from_its_position() -> None:
    order = Order(5, 0)
    drawn = order.take(0, 15)
    assert [sorted(drawn[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert drawn[:5] != drawn[5:10]
    assert Order(5, 0).take(7, 4) == drawn[7:11]
    assert Order(5, 1).take(0, 5) != drawn[:5] or Order(5, 2).take(0, 5) != drawn[:5]


def test_differences_names_knobs() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "d": 3}) == ["a.c"]


def test_texts_are_drawn_in_order_of_their_position(names, tmp_path) -> None:
    asked: list[int] = []

    def texts(count: int) -> list[Text]:
        asked.append(count)
        return [Text([BOS, 5, 6], 1)] * count

    tiny_engine(small_config(ptx__coef=0.1, ptx__batch_size=3, batch__epochs=2), texts=texts).step(prompts(8))
    assert asked == [3] * 4


def test_text_and_chats_are_tokenised_as_data_is() -> None:
    tokenizer = tiny_text_tokenizer(CHAT_TEMPLATE)
    engine = tiny_engine(
        small_config(rollout__max_new_tokens=2), policy=tiny_llama(tied=False), reward=lambda p, r: [0.0] * len(r),
        critic=tiny_llama(tied=False), tokenizer=tokenizer,
    )  # fmt: skip
    chat = [{"role": "user", "content": "the film"}]
    given = ["the film is", f"<s>{'the film is'}", chat]
    (want,), _ = load_prompts([{"prompt": chat}], tokenizer, 64)
    (plain,), _ = load_prompts([{"prompt": "the film is"}], tokenizer, 64)
    asked = [list(p) for p, _ in engine.rollout(given).sequences()]
    assert asked == [plain, plain, want]
    with pytest.raises(ValueError, match=r"empty chat|prompt 0 is empty"):
        engine.rollout([[]])
    with pytest.raises(DataError, match="malformed chat"):
        engine.rollout([[{"role": "user"}]])
