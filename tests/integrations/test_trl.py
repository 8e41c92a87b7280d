"""TRL's own trainers, patched against unpatched. `pip install "trl<1.11"` is enough; it runs on CPUs."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ppomax.integrations import IntegrationError
from ppomax.integrations.trl import logprobs, patched_ppo
from ppomax.models import make_critic
from ppomax.saving.model_folder import save_model
from torch import Tensor
from transformers import set_seed

from tests.engine.tiny import prompts, tiny_policy, tiny_reward, tiny_tokenizer

if importlib.util.find_spec("trl") is None:
    pytest.skip("trl: not installed; pip install 'trl<1.11'", allow_module_level=True)
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


@pytest.fixture
def ppo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """trl.experimental.ppo.ppo_trainer, as it is when the test ends."""
    ppo_trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="this trl has no PPOTrainer")
    for owner, name in ((ppo_trainer.PPOTrainer, "train"), (ppo_trainer.PolicyAndValueWrapper, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return ppo_trainer


def trainer(ppo: Any, out: Path, **knobs: Any) -> Any:
    """TRL's PPOTrainer on tiny models: 5 steps of 8 prompts, two epochs."""
    from trl.experimental.ppo import PPOConfig

    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "total_episodes": 40,
             "num_ppo_epochs": 2, "num_mini_batches": 1, "response_length": 7, "temperature": 0.9, "stop_token": "eos",
             "learning_rate": 3e-3, "missing_eos_penalty": 1.0, "kl_coef": 0.1}  # fmt: skip
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
              "gradient_checkpointing": False, "num_sample_generations": 0, "logging_steps": 1, "seed": 3}  # fmt: skip
    set_seed(3)
    return ppo.PPOTrainer(
        args=PPOConfig(output_dir=str(out), **common, **(given | knobs)),
        processing_class=tokenizer,
        model=tiny_policy(1),
        ref_model=tiny_policy(2),
        reward_model=tiny_reward(3).model,
        value_model=make_critic(tiny_policy(4), seed=4).model,
        train_dataset=Dataset.from_dict({"input_ids": prompts(24)}),
    )


def logged(run: Any) -> list[dict[str, float]]:
    set_seed(5)
    run.train()
    return [row for row in run.state.log_history if "loss/policy_avg" in row]


def replayed(ppo: Any, monkeypatch: pytest.MonkeyPatch, drawn: list[list[int]], stop: int | None) -> None:
    """Have TRL's `generate` give these responses, with the logits that its own sampling would have seen."""
    rows = iter(drawn)

    def generate(model: Any, queries: Tensor, pad: int, config: Any) -> tuple[Tensor, Tensor]:
        responses = [next(rows) for _ in queries]
        width = max(map(len, responses))
        padded = torch.tensor([r + [pad] * (width - len(r)) for r in responses])
        whole = torch.cat([queries, padded], 1)
        logits = ppo.forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / config.temperature

    monkeypatch.setattr(ppo, "generate", generate)


CASES = {
    "as the examples do": {},
    "no stop token, k3, rewards whitened": {
        "stop_token": None, "kl_estimator": "k3", "whiten_rewards": True, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    },
    "minibatches, parts, discount": {
        "num_mini_batches": 2, "local_rollout_forward_batch_size": 3, "gamma": 0.9, "lam": 0.8,
        "cliprange_value": 0.01, "cliprange": 0.02,
    },
}  # fmt: skip


@pytest.mark.parametrize("knobs", CASES.values(), ids=CASES.keys())
def test_a_patched_run_has_the_losses_of_trl_s(ppo: Any, tmp_path: Path, monkeypatch: Any, knobs: Any) -> None:
    """Five steps, in each the same responses: what our decoder drew is given to TRL's own code."""
    theirs, drawn = trainer(ppo, tmp_path, **knobs), []
    with monkeypatch.context() as patch:
        real = patched_ppo.decode
        patch.setattr(patched_ppo, "decode", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
        patched_ppo.patch_ppo()
        ours = trainer(ppo, tmp_path, **knobs)
        found = logged(ours)
        monkeypatch.undo()
    replayed(ppo, monkeypatch, [r for d in drawn for r in d.tokens], theirs.stop_token_id)
    wanted = logged(theirs)
    assert len(found) == len(wanted) == 5
    # TRL's figures of the update are means over a table with gradient_accumulation_steps cells a minibatch, all of
    # which are filled where there is one minibatch.
    filled = 1 / knobs.get("num_mini_batches", 1)
    for mine, row in zip(found, wanted, strict=True):
        for name in ("loss/policy_avg", "loss/value_avg", "val/clipfrac_avg"):
            assert mine[name] * filled == pytest.approx(row[name], rel=1e-4, abs=1e-4), name
        for name in ("objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy", "lr", "episode"):
            assert mine[name] == pytest.approx(row[name], rel=1e-4, abs=1e-4), name
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_another_train_is_refused_by_name(ppo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it is, not by the version that it says."""

    def train(self: Any) -> None:
        """Another loss."""

    monkeypatch.setattr(ppo.PPOTrainer, "train", train)
    with pytest.raises(IntegrationError, match=r"train of trl .* is not that of trl 1.0 to 1.9 and 1.10"):
        patched_ppo.patch_ppo()


# ---- GRPO and RLOO --------------------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Any:
    trl = pytest.importorskip("trl")
    for owner in (trl.GRPOTrainer, trl.RLOOTrainer):
        monkeypatch.setattr(owner, logprobs.METHOD, getattr(owner, logprobs.METHOD))
    return trl


def run_of(trl: Any, name: str, out: Path, **knobs: Any) -> Any:
    """Three steps of GRPO or RLOO; which sample from torch's generator, so that both runs see the same texts."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    save_model(tiny_policy(1), tokenizer, out / "policy")
    config = getattr(trl, f"{name}Config")(
        output_dir=str(out), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
        max_steps=3, logging_steps=1, learning_rate=1e-3, beta=0.1, temperature=0.9, seed=3,
        model_init_kwargs={"dtype": "float32"}, **knobs,
    )  # fmt: skip
    set_seed(3)
    return getattr(trl, f"{name}Trainer")(
        model=str(out / "policy"),
        reward_funcs=lambda completions, **_: [float(len(c.split())) for c in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w5 w6", "w7", "w8 w9 w10", "w11"] * 4}),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("knobs", [{}, {"entropy_coef": 0.05}, {"top_entropy_quantile": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_grpo_and_rloo_are_as_before(
    online: Any, tmp_path: Path, monkeypatch: Any, name: str, knobs: dict[str, float]
) -> None:
    known = {f.name for f in dataclasses.fields(getattr(online, f"{name}Config"))}
    if not knobs.keys() <= known:
        pytest.skip(f"{name}Config of this trl has no {', '.join(knobs)}")
    calls: list[int] = []
    real = logprobs.head_logprobs
    monkeypatch.setattr(logprobs, "head_logprobs", lambda *a, **k: calls.append(1) or real(*a, **k))

    def trained() -> tuple[list[Any], list[Tensor]]:
        run = run_of(online, name, tmp_path, **knobs)
        run.train()
        return [r for r in run.state.log_history if "loss" in r], list(run.model.parameters())

    theirs = trained()
    assert not calls
    logprobs.patch_logprobs()
    ours = trained()
    assert calls, "the patch was not used"
    for mine, row in zip(ours[0], theirs[0], strict=True):
        for figure in ("loss", "entropy", "grad_norm", "reward"):
            if figure in row:
                assert float(mine[figure]) == pytest.approx(float(row[figure]), rel=1e-3, abs=1e-4), figure
    for p, q in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_a_changed_method_is_refused_by_name(online: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online.RLOOTrainer, logprobs.METHOD, lambda self, model, tokens: None)
    with pytest.raises(IntegrationError, match=r"of trl .* is without input_ids, .* and with tokens of parameters"):
        logprobs.patch_logprobs()
