"""TRL's PPOTrainer on our engine, and its older step() form: both run without TRL."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ppomax.config import ConfigError
from ppomax.integrations.trl import PPOConfig, PPOTrainer, step
from ppomax.integrations.trl.config import FIELDS, train_config
from ppomax.models import make_critic
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, set_seed

from tests.engine.tiny import prompts, tiny_policy, tiny_reward, tiny_tokenizer

pytest.importorskip("accelerate", reason="accelerate: not installed; transformers' TrainingArguments need it")
PAGE = Path(__file__).resolve().parents[2] / "engine/ppomax/integrations/trl/COMING_FROM_TRL.md"


def config(out: Path, **knobs: Any) -> PPOConfig:
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "total_episodes": 32, "seed": 3,
             "num_ppo_epochs": 2, "response_length": 7, "stop_token": "eos", "missing_eos_penalty": 1.0,
             "learning_rate": 1e-3, "save_strategy": "no", "num_sample_generations": 0}  # fmt: skip
    return PPOConfig(
        output_dir=str(out), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **(given | knobs)
    )


def trainer(args: PPOConfig, **parts: Any) -> PPOTrainer:
    given = {"ref_model": tiny_policy(2), "reward_model": tiny_reward(3).model,
             "value_model": make_critic(tiny_policy(4), seed=4).model,
             "train_dataset": Dataset.from_dict({"input_ids": prompts(24)})}  # fmt: skip
    return PPOTrainer(args, tiny_tokenizer(), tiny_policy(1), **(given | parts))


# ---- the shim on the engine -----------------------------------------------------------------------------------------


def test_it_trains_logs_saves_and_calls_back(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(f"log {state.global_step} {'objective/rlhf_reward' in logs}")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(f"save {state.global_step}")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            seen.append("end")

    run = trainer(config(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1), callbacks=[Watch()])
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train()
    assert seen == ["log 1 True", "log 2 True", "save 2", "log 3 True", "log 4 True", "save 4", "end"]
    assert any(not torch.equal(p, q) for p, q in zip(before, run.model.parameters(), strict=True))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    for folder in (tmp_path / "checkpoint-4", tmp_path):
        run.save_model(str(tmp_path))  # as TRL's scripts end, where the checkpoints lie
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(loaded.state_dict(), run.model.state_dict(), rtol=0, atol=0)
    assert (tmp_path / "engine" / "step-000004").is_dir()


def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    class StopAfterTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    whole = trainer(config(tmp_path / "whole"))
    whole.train()
    knobs = {"save_strategy": "steps", "save_steps": 2}
    trainer(config(tmp_path / "cut", **knobs), callbacks=[StopAfterTwo()]).train()
    resumed = trainer(config(tmp_path / "cut", **knobs))
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    names = ("step", "loss/policy_avg", "objective/scores")
    logs = [[[row[n] for n in names] for row in run.state.log_history] for run in (whole, resumed)]
    assert logs[0] == logs[1]


def test_rewards_by_a_function_and_text_prompts(tmp_path: Path) -> None:
    """What TRL's had not; lengths go where the reward points."""
    rows = Dataset.from_dict({"prompt": ["w5 w6", "w7", "w8 w9 w10"] * 8})
    run = trainer(
        config(tmp_path, total_episodes=128, learning_rate=3e-3),
        reward_model=lambda prompts, responses: [float(len(r.split())) for r in responses],
        value_model=None, ref_model=None, train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    run.train()
    scores = [row["objective/scores"] for row in run.state.log_history]
    assert sum(scores[-4:]) > sum(scores[:4])


def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_peft_config_trains_adapters_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft: not installed")
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    run = trainer(config(tmp_path), ref_model=None, peft_config=lora)
    assert run.config.model.lora_targets == ("q_proj", "v_proj")
    assert all("lora" in name for name in run.engine.policy.names)
    run.train()
    run.save_model()
    weights = [m.model.layers[0].self_attn.q_proj.weight for m in (tiny_policy(1), _loaded(tmp_path))]
    assert not torch.equal(*weights)
    with pytest.raises(ConfigError, match=r"lora_dropout=0\.1"):
        trainer(config(tmp_path), peft_config=peft.LoraConfig(r=4, lora_dropout=0.1))


def test_samples_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(config(tmp_path), eval_dataset=Dataset.from_dict({"input_ids": prompts(3)}))
    run.generate_completions()
    assert "model response" in capsys.readouterr().out


def test_every_field_of_ppo_config_is_mapped_or_told_why_not() -> None:
    own = {f.name for f in dataclasses.fields(PPOConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    assert own <= FIELDS.keys()
    page = PAGE.read_text(encoding="utf-8")
    missing = [f for f, knob in FIELDS.items() if f"| `{f}` | {knob} |" not in page]
    assert not missing, f"COMING_FROM_TRL.md is not the table of config.py: {missing[0]}"


def test_every_field_of_trl_s_own_ppo_config_is_mapped() -> None:
    theirs = pytest.importorskip("trl.experimental.ppo", reason="trl: not installed; pip install 'trl<1.11'").PPOConfig
    own = {f.name for f in dataclasses.fields(theirs)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    assert own <= FIELDS.keys()


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"whiten_rewards": True}, "whiten_rewards=True is not served; leave it off"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type='polynomial'.*is not served; use one of linear"),
        ({"optim": "adafactor"}, "optim=.*both models are trained by AdamW"),
        ({"num_mini_batches": 3}, "num_mini_batches=3 must divide the batch of 8"),
        ({"push_to_hub": True}, "push_to_hub=True is not served"),
    ],
)
def test_what_is_not_served_is_refused(tmp_path: Path, knobs: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer(config(tmp_path, **knobs))


def test_what_has_no_counterpart_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_config(config(tmp_path, neftune_noise_alpha=5.0), rows=24, ranks=1, longest_prompt=9)
    assert "PPOConfig.neftune_noise_alpha=5.0 has no counterpart here and is left out" in caplog.text
    assert len(caplog.records) == 1


def test_knobs_are_the_fields(tmp_path: Path) -> None:
    args = config(tmp_path, num_mini_batches=4, warmup_steps=4, max_grad_norm=0.0, cliprange=0.1, lam=0.9)
    found = train_config(args, rows=24, ranks=2, longest_prompt=9)
    assert (found.batch.rollout_size, found.batch.minibatch_size, found.batch.epochs) == (16, 4, 2)
    assert found.run.steps == 2
    assert found.batch.micro_tokens == 4 * (9 + 7)
    assert found.policy_optim.warmup == pytest.approx(4 / 16)
    assert found.policy_optim.grad_clip is None
    assert (found.loss.clip_low, found.loss.clip_high, found.advantage.lam) == (0.1, 0.1, 0.9)
    assert (found.reward.standardize, found.ptx.coef, found.critic.pretrain_steps) == ("none", 0.0, 0)


# ---- the older form -------------------------------------------------------------------------------------------------


def old_trainer(model: Any = None, **knobs: Any) -> step.PPOTrainer:
    given = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-3, "kl_penalty": "kl"}
    torch.manual_seed(0)
    model = model or step.AutoModelForCausalLMWithValueHead(tiny_policy(1))
    return step.PPOTrainer(step.PPOConfig(**(given | knobs)), model, tiny_policy(2), tiny_tokenizer())


def masked(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    mean = masked(x, mask)
    var = masked((x - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
    return (x - mean) * torch.rsqrt(var + 1e-8) + (0.0 if shift else mean)


def padded_step(run: step.PPOTrainer, queries: Any, responses: Any, scores: Tensor, masks: Any) -> list[Tensor]:
    """TRL 0.11's step in plain padded torch: trains `run.model` with `run.optimizer`; losses of each minibatch."""
    c, model = run.config, run.model
    rows = [torch.cat(x) for x in zip(queries, responses, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    mask = torch.zeros(ids.shape)
    for i, (q, r) in enumerate(zip(queries, responses, strict=True)):
        mask[i, len(q) : len(q) + len(r)] = 1.0 if masks is None else masks[i].float()
    mask = mask[:, 1:]

    def forward(m: Any, which: Any) -> tuple[Tensor, Any]:
        out = m(input_ids=ids[which], attention_mask=attention[which])
        logits, values = (out[0], out[2]) if isinstance(out, tuple) else (out.logits, None)
        logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[which, 1:, None])[..., 0]
        return logprobs, None if values is None else values[:, :-1]

    every = torch.arange(len(rows))
    with torch.no_grad():
        old, values = forward(model, every)
        ref, _ = forward(run.ref_model, every)
        d = old - ref
        kl = {"kl": d, "abs": d.abs(), "mse": 0.5 * d**2}[c.kl_penalty]
        rewards = -c.init_kl_coef * kl
        for i in range(len(rows)):
            rewards[i, mask[i].nonzero()[-1]] += scores[i]
        values, rewards = values * mask, rewards * mask
        if c.whiten_rewards:
            rewards = whiten(rewards, mask, shift=False) * mask  # TRL left its padding whitened too
        last, found = torch.zeros(len(rows)), []
        for t in reversed(range(mask.shape[1])):
            after = values[:, t + 1] if t + 1 < mask.shape[1] else 0.0
            last = rewards[:, t] + c.gamma * after - values[:, t] + c.gamma * c.lam * last
            found.append(last)
        advantages = torch.stack(found[::-1], 1)
        returns = advantages + values
        advantages = whiten(advantages, mask)
    losses = []
    import numpy as np

    for _ in range(c.ppo_epochs):
        for which in torch.from_numpy(np.random.permutation(c.batch_size)).split(c.mini_batch_size):
            new, v = forward(model, which)
            m, ratio = mask[which], (new - old[which]).exp()
            clipped = v.clamp(values[which] - c.cliprange_value, values[which] + c.cliprange_value)
            target = returns[which]
            vf = 0.5 * masked(torch.max((v - target) ** 2, (clipped - target) ** 2), m)
            a = advantages[which]
            pg = masked(torch.max(-a * ratio, -a * ratio.clamp(1 - c.cliprange, 1 + c.cliprange)), m)
            (pg + c.vf_coef * vf).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            losses.append(torch.stack([pg, vf]).detach())
    return losses


@pytest.mark.parametrize(
    "knobs",
    [{}, {"kl_penalty": "abs", "whiten_rewards": True, "gamma": 0.9}, {"kl_penalty": "mse", "cliprange_value": 0.02}],
    ids=["plain", "abs, whitened, discounted", "mse, tight clip"],
)
@pytest.mark.parametrize("turns", [False, True], ids=["one turn", "tool tokens masked"])
def test_a_step_is_trl_s(knobs: dict[str, Any], turns: bool) -> None:
    ours, theirs = old_trainer(**knobs), old_trainer(**knobs)
    queries = [torch.tensor(p) for p in prompts(8)]
    responses = ours.generate(queries, return_prompt=False, max_new_tokens=9, min_new_tokens=2, temperature=1.3)
    masks = None
    if turns:
        masks = [torch.arange(len(r)) % 3 != 1 for r in responses]
    g = torch.Generator().manual_seed(2)
    scores = torch.randn(8, generator=g)
    set_seed(4)
    wanted = torch.stack(padded_step(theirs, queries, responses, scores, masks)).mean(0)
    set_seed(4)
    stats = ours.step(queries, responses, list(scores), masks)
    assert stats["ppo/loss/policy"] == pytest.approx(float(wanted[0]), abs=1e-4)
    assert stats["ppo/loss/value"] == pytest.approx(float(wanted[1]), rel=1e-4, abs=1e-4)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


def test_generate_gives_what_was_asked_for() -> None:
    run = old_trainer()
    queries = [torch.tensor(p) for p in prompts(3)]
    whole = run.generate(queries, max_new_tokens=5, do_sample=False)
    again = run.generate(queries, max_new_tokens=5, do_sample=False, return_prompt=False)
    assert all(torch.equal(w, torch.cat([q, r])) for w, q, r in zip(whole, queries, again, strict=True))
    model = run.accelerator.unwrap_model(run.model)
    theirs = model.generate(input_ids=queries[0][None], max_new_tokens=5, do_sample=False)[0]
    assert torch.equal(whole[0], theirs[: len(whole[0])])
    with pytest.raises(ConfigError, match=r"generate: num_beams is not served; known are do_sample"):
        run.generate(queries, num_beams=3)


def test_the_value_head_is_kept_with_the_model(tmp_path: Path) -> None:
    run = old_trainer()
    run.save_pretrained(tmp_path)
    loaded = step.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), run.model.state_dict(), rtol=0, atol=0)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_adapters_are_trained_and_the_reference_is_without_them() -> None:
    peft = pytest.importorskip("peft", reason="peft: not installed")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = step.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_policy(1), peft_config=lora)
    run = step.PPOTrainer(
        step.PPOConfig(batch_size=8, mini_batch_size=8, learning_rate=1e-2), model, None, tiny_tokenizer()
    )
    queries = [torch.tensor(p) for p in prompts(8)]
    responses = run.generate(queries, return_prompt=False, max_new_tokens=9)
    first = run.step(queries, responses, [float(len(r)) for r in responses])
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    second = run.step(queries, responses, [float(len(r)) for r in responses])
    assert abs(second["objective/kl"]) > 1e-3
    frozen = [n for n, p in model.pretrained_model.named_parameters() if p.requires_grad and "lora" not in n]
    assert not frozen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, r, s: (q[:7], r, s), r"queries must be 8 \(batch_size\), got 7"),
        (lambda q, r, s: (q, [*r[:7], torch.zeros(0, dtype=torch.long)], s), r"responses\[7\] must be a 1-d id tensor"),
        (lambda q, r, s: (q, r, [*s[:7], float("nan")]), "scores must be finite"),
    ],
)
def test_what_step_cannot_take_is_named(change: Any, words: str) -> None:
    queries = [torch.tensor(p) for p in prompts(8)]
    given = change(queries, queries, [0.0] * 8)
    with pytest.raises(ValueError, match=words):
        old_trainer().step(*given)
