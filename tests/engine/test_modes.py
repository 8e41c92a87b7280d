"""What of the policy is trained: full, adapters, or the top blocks on a frozen trunk. In each mode the reference is the
start model, scoring and training see the same numbers, frozen weights stay as they are, and runs resume to the bit."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ppomax.config import ConfigError, load_config
from ppomax.data import Text
from ppomax.engine import Engine
from ppomax.models import adapters, blocks_of, head_of, load_policy, packed_hidden
from ppomax.models.branch import Branch, TrunkCritic, bottom_states, check_branch
from ppomax.models.modes import start_policy
from ppomax.recipe.batch import Rollout, minibatch, pack, select_trunk
from ppomax.recipe.rollout import Scorers, score
from ppomax.recipe.scoring import score_states, state_hidden, state_values
from ppomax.recipe.update import policy_loss
from ppomax.reporting.monitor import RunMonitor
from ppomax.rollout import Responses
from ppomax.saving.export_policy import export_policy
from ppomax.saving.folder import CheckpointError
from ppomax.stages.ppo import train_ppo
from ppomax.stages.pretrain_critic import pretrain_critic
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.engine.test_models import FAMILIES
from tests.engine.tiny import (
    BOS,
    EOS,
    SMALL,
    VOCABULARY,
    prompts,
    small_config,
    tiny_assets,
    tiny_reward,
    tiny_tokenizer,
)

CLOSE = 1e-5
DEPTH, TRAINED = 4, 2
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"model__train": "lora", "model__lora_rank": 4},
    "hydra": {"model__train": "hydra", "model__trained_layers": TRAINED},
    "hydra, value branch": {"model__train": "hydra", "model__trained_layers": TRAINED, "model__critic": "trunk"},
}
HYDRA = MODES["hydra"]
NAMES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text", "GPT2")


def family(name: str = "Llama", **knobs: Any) -> PreTrainedModel:
    """A tiny random model of four blocks, its weights far enough from the initial ones to matter."""
    config_class = getattr(transformers, f"{name}Config")
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": EOS}
    if name == "GPT2":
        config = config_class(n_embd=32, n_layer=DEPTH, n_head=4, n_positions=64, **special)
    else:
        sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        config = config_class(
            num_hidden_layers=DEPTH, max_position_embeddings=64, **sizes, **special, **{**FAMILIES[name], **knobs}
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def engine_of(model: PreTrainedModel | None = None, **knobs: Any) -> Engine:
    options = {"policy_optim__lr": 1e-2, "policy_optim__warmup": 0.0, **knobs}
    return Engine(model or family(), None, None, tiny_reward(), small_config(**options))


def by_full_forward(model: PreTrainedModel, roll: Rollout) -> torch.Tensor:
    with torch.no_grad():
        return score_states(model, roll.tokens, roll.cu_seqlens, roll.states, impl="ref").logprobs


def largest(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).detach().abs().max())


def weights(model: torch.nn.Module, trained: bool) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad == trained}


# ---- every mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["lora", "hydra"])
def test_logprobs_equal_full_forwards_of_start_and_trained_model(name: str, mode: str) -> None:
    engine = engine_of(family(name), **MODES[mode])
    start = copy.deepcopy(family(name))
    frozen = weights(engine.policy.module, trained=False)
    first = engine.rollout(prompts(8))
    assert torch.equal(first.logprobs, first.ref_logprobs)
    for seed in range(2):
        engine.step(prompts(8, seed=seed))
    roll = engine.rollout(prompts(8, seed=2))
    assert largest(roll.ref_logprobs, by_full_forward(start, roll)) <= CLOSE
    assert largest(roll.logprobs, by_full_forward(engine.policy.module, roll)) <= CLOSE
    assert largest(roll.logprobs, roll.sampler_logprobs) <= CLOSE
    assert largest(roll.logprobs, roll.ref_logprobs) > 1e-3
    after = weights(engine.policy.module, trained=False)
    assert frozen.keys() == after.keys()
    assert all(torch.equal(x, after[n]) for n, x in frozen.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_first_ratio_is_one_and_values_are_those_of_the_rollout(mode: str, dtype: str) -> None:
    engine = engine_of(batch__epochs=2, model__dtype=dtype, **MODES[mode])
    for seed in range(2):
        metrics = engine.step(prompts(8, seed=seed)).metrics
        assert metrics["val/first_ratio_gap"] <= 1e-6
        assert metrics["val/first_value_gap"] <= 1e-6
        assert metrics["val/ratio_max"] > 1 + 1e-4
        assert metrics["val/skipped"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_saved_and_restored_to_the_bit(mode: str, tmp_path: Path) -> None:
    engine, other = engine_of(**MODES[mode]), engine_of(**MODES[mode])
    engine.step(prompts(8))
    engine.save(tmp_path / "state")
    other.restore(tmp_path / "state")
    a, b = engine.step(prompts(8, seed=1)).metrics, other.step(prompts(8, seed=1)).metrics
    assert {k: v for k, v in a.items() if "time" not in k and "per_second" not in k} == {
        k: v for k, v in b.items() if "time" not in k and "per_second" not in k
    }
    for x, y in ((engine.policy, other.policy), (engine.critic, other.critic)):
        assert all(torch.equal(p, q) for p, q in zip(x.params, y.params, strict=True))
    assert load_file(tmp_path / "state" / "policy.safetensors").keys() == set(engine.policy.names)


@pytest.mark.parametrize("mode", ["lora", "hydra", "hydra, value branch"])
def test_loaded_alone_it_wants_the_start_policy(mode: str, tmp_path: Path) -> None:
    engine = engine_of(**MODES[mode])
    engine.step(prompts(8))
    engine.save(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"Engine\.load\(\.\.\., policy=\)"):
        Engine.load(tmp_path / "state", reward=tiny_reward())
    foreign = family()
    with torch.no_grad():
        blocks_of(foreign)[0].mlp.up_proj.weight.add_(1e-3)
    with pytest.raises(CheckpointError, match="saved with another policy"):
        Engine.load(tmp_path / "state", policy=foreign, reward=tiny_reward())
    loaded = Engine.load(tmp_path / "state", policy=family(), reward=tiny_reward())
    a, b = engine.step(prompts(8, seed=1)).metrics, loaded.step(prompts(8, seed=1)).metrics
    assert a["loss/policy_avg"] == b["loss/policy_avg"]
    assert a["loss/value_avg"] == b["loss/value_avg"]


@pytest.mark.parametrize("mode", MODES)
def test_start_policy_is_the_start(mode: str) -> None:
    engine = engine_of(**MODES[mode])
    engine.step(prompts(8))
    tokens, cu = pack([[5, 6, 7, 8, 9], [3, 4]])
    with torch.no_grad(), start_policy(engine.policy, engine.reference) as start:
        assert largest(packed_hidden(start, tokens, cu), packed_hidden(family(), tokens, cu)) <= CLOSE
        assert torch.equal(head_of(start).weight, head_of(family()).weight)
        given = start.generate(tokens[None, :5], max_new_tokens=4, do_sample=False)
        assert given.tolist() == family().generate(tokens[None, :5], max_new_tokens=4, do_sample=False).tolist()
    assert largest(packed_hidden(engine.policy.module, tokens, cu), packed_hidden(family(), tokens, cu)) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_export_is_a_whole_model(name: str, mode: str, tmp_path: Path) -> None:
    engine = engine_of(family(name), **MODES[mode])
    engine.step(prompts(8))
    path = export_policy(engine, tmp_path / "policy")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        want = engine.policy.module(ids).logits
        assert largest(AutoModelForCausalLM.from_pretrained(path)(ids).logits, want) <= CLOSE
        assert largest(family(name)(ids).logits, want) > 1e-3
        if mode == "lora":
            again = family(name)
            again.load_adapter(str(path / "adapter"))
            assert largest(again(ids).logits, want) <= CLOSE


@pytest.mark.parametrize("mode", ["lora", "hydra, value branch"])
def test_stopped_run_resumes_to_the_bit(mode: str, tmp_path: Path) -> None:
    """Whole runs with ptx texts from the start policy: one left alone, one stopped after two steps and resumed."""
    names = tiny_assets(tmp_path / "assets")
    knobs = {**SMALL, **names, "ptx.coef": 0.1, "ptx.pool": 8, "policy_optim.lr": 1e-2}
    knobs |= {k.replace("__", "."): v for k, v in MODES[mode].items()}
    if "model.trained_layers" in knobs:
        knobs["model.trained_layers"] = 1  # of the two that the policy on disk has

    class Stop(RunMonitor):
        def log(self, step: int, metrics: dict[str, float]) -> Any:
            super().log(step, metrics)
            return "stop" if step == 2 else None

    whole = train_ppo(load_config(overrides={**knobs, "run.out": str(tmp_path / "whole")}))
    cut = load_config(overrides={**knobs, "run.out": str(tmp_path / "cut"), "run.resume": True})
    (tmp_path / "cut").mkdir()
    train_ppo(cut, Stop(tmp_path / "cut", cut))
    train_ppo(cut)
    a, b = (load_file(out / "policy" / "model.safetensors") for out in (whole, tmp_path / "cut"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


# ---- hydra ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_hydra_trains_top_blocks_and_norm_and_holds_no_more(tied: bool) -> None:
    engine = engine_of(family(tie_word_embeddings=tied), **MODES["hydra, value branch"])
    policy = engine.policy.module
    top = {f"model.layers.{i}." for i in range(DEPTH - TRAINED, DEPTH)}
    assert {n for n in engine.policy.names if not any(n.startswith(t) for t in top)} == {"model.norm.weight"}
    count = sum(p.numel() for p in engine.policy.params)
    assert sum(p.numel() for p in engine.reference.parameters()) == count
    assert sum(p.numel() for p in engine.critic.params) == count + policy.config.hidden_size
    owned = {p.data_ptr() for p in policy.parameters()}
    assert not owned & {p.data_ptr() for m in (engine.reference, engine.critic.module) for p in m.parameters()}
    assert engine.reference.head.weight is head_of(policy).weight
    engine.step(prompts(8))
    roll = engine.rollout(prompts(8))
    assert largest(roll.ref_logprobs, by_full_forward(family(tie_word_embeddings=tied), roll)) <= CLOSE


def test_trunk_runs_neither_in_scoring_nor_in_the_update() -> None:
    engine = engine_of(batch__epochs=2, **MODES["hydra, value branch"])
    experience = engine.experience(engine.rollout(prompts(8)))
    roll, trunk = experience.rollout, experience.rollout.trunk
    lengths = (roll.cu_seqlens.diff() - 1).tolist()
    assert trunk.states.shape == (sum(lengths), 32)
    policy = engine.policy.module
    with torch.no_grad():
        want = bottom_states(policy, roll.tokens, roll.cu_seqlens, trunk.layers)
    ends = torch.ones(len(roll.tokens), dtype=torch.bool).index_fill(0, roll.cu_seqlens[1:].long() - 1, False)
    assert largest(trunk.states, want[ends]) <= CLOSE
    ran: list[str] = []
    for module in (policy.get_input_embeddings(), *blocks_of(policy)[: trunk.layers]):
        module.register_forward_hook(lambda m, inputs, output: ran.append(type(m).__name__))
    engine.update(experience)
    given = [r for _, r in roll.sequences()]
    recorded = Responses(
        given, [[0.0] * len(r) for r in given], roll.finished.tolist(), list(trunk.states.split(lengths))
    )
    models = Scorers(policy, engine.reference, engine.critic.module, trunk.layers)
    again = score(models, [p for p, _ in roll.sequences()], recorded, roll.micro_batches, impl="ref")
    assert ran == []
    assert torch.equal(again.ref_logprobs, roll.ref_logprobs)
    assert not torch.equal(again.logprobs, roll.logprobs)
    unrecorded = dataclasses.replace(recorded, trunk=None)
    computed = score(models, [p for p, _ in roll.sequences()], unrecorded, roll.micro_batches, impl="ref")
    assert len(ran) > 0  # a sampler that recorded nothing: the trunk runs once
    assert largest(computed.ref_logprobs, roll.ref_logprobs) <= CLOSE
    ran.clear()
    policy(torch.tensor([[1, 2]]))
    assert len(ran) == 1 + trunk.layers


def test_hydra_update_is_the_full_update_of_its_layers() -> None:
    hydra, full = engine_of(**HYDRA), engine_of()
    experience = hydra.experience(hydra.rollout(prompts(8)))
    generator = torch.Generator().manual_seed(1)
    named = dict(full.policy.module.named_parameters())
    with torch.no_grad():  # away from what scored the buffer, so that ratios are not 1
        for name, p in hydra.policy.module.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.03)
                named[name].copy_(p)
    micro = minibatch(experience, torch.arange(8))
    tokens = torch.tensor(float(len(micro.labels)))
    losses = []
    for engine, batch in ((hydra, micro), (full, dataclasses.replace(micro, trunk=None))):
        loss, metrics = policy_loss(engine.policy, batch, tokens, engine.config)
        engine.policy.backward(loss)
        losses.append(float(loss.detach()))
        assert float(metrics["ratio_max"]) > 1.01
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE, abs=CLOSE)
    for name, p in zip(hydra.policy.names, hydra.policy.params, strict=True):
        assert float((p.grad - named[name].grad).norm()) <= CLOSE * max(1e-3, float(named[name].grad.norm())), name
    assert all(p.grad is None for p in hydra.policy.module.parameters() if not p.requires_grad)


def test_value_branch_starts_as_the_policy_and_learns() -> None:
    def first_word(asked: list[str], given: list[str]) -> list[float]:
        return [float(len(g.split()[0])) if g.split() else 0.0 for g in given]

    config = small_config(
        critic__pretrain_epochs=4, batch__rollout_size=32, batch__minibatch_size=8, critic_optim__lr=3e-3,
        kl__coef=0.0, reward__standardize="none", reward__missing_eos_penalty=None, **MODES["hydra, value branch"],
    )  # fmt: skip
    engine = Engine(family(), None, None, first_word, config, tokenizer=tiny_tokenizer())
    critic = engine.critic.module
    assert isinstance(critic, TrunkCritic)
    roll = engine.rollout(prompts(8))
    with torch.no_grad():
        hidden = state_hidden(family(), roll.tokens, roll.cu_seqlens, roll.states)
    assert largest(roll.values, hidden @ critic.score.weight[0]) <= CLOSE
    policy = weights(engine.policy.module, trained=True)
    rows = [pretrain_critic(engine, prompts(32, seed=s))[0] for s in range(5)]
    assert rows[-1]["pretrain/explained_var"] > rows[0]["pretrain/explained_var"] + 0.1
    assert all(torch.equal(x, policy[n]) for n, x in weights(engine.policy.module, trained=True).items())


def test_ptx_of_hydra_runs_the_whole_model_and_trains_the_top() -> None:
    config = small_config(ptx__coef=1.0, kl__coef=0.0, **HYDRA)
    engine = Engine(family(), None, None, tiny_reward(), config, texts=lambda n: [Text([1, 5, 6, 7, 8], 2)] * n)
    frozen = weights(engine.policy.module, trained=False)
    losses = [engine.step(prompts(8)).metrics["loss/ptx_avg"] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(x, frozen[n]) for n, x in weights(engine.policy.module, trained=False).items())


@pytest.mark.parametrize("name", FAMILIES)
def test_branch_equals_the_whole_model(name: str) -> None:
    model = load_policy(family(name))
    tokens, cu = pack([[5, 6, 7, 8, 9], [3], [4, 4, 9, 1, 0, 2, 11, 30, 31, 32, 7, 8], [2, 1]])
    with torch.no_grad():
        want = packed_hidden(model, tokens, cu)
        for layers in range(1, DEPTH):
            trunk, branch = bottom_states(model, tokens, cu, layers), Branch(model, layers)
            for got in (branch(trunk, cu), branch.copied()(trunk, cu), branch(trunk, cu, layout="packed")):
                assert largest(got, want) <= CLOSE


def test_branch_under_gradient_checkpointing_recomputes_from_its_own_states() -> None:
    tokens, cu = pack([[5, 6, 7, 8, 9], [3, 4]])
    grads = []
    for checkpointing in (False, True):
        model = load_policy(family("GPT2"))
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
        trunk = bottom_states(model, tokens, cu, 2)
        branch = Branch(model, 2)
        hidden = branch(trunk, cu)
        branch(torch.zeros_like(trunk), cu)  # what a later micro-batch would leave behind
        hidden.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in blocks_of(model)[2:].parameters()]))
    assert largest(*grads) <= CLOSE * float(grads[0].abs().max())


def test_a_model_whose_upper_layers_read_more_is_refused() -> None:
    model = family()
    low: list[torch.Tensor] = []  # as if the base model handed block 0's output to block 3
    blocks_of(model)[0].register_forward_hook(lambda m, inputs, output: low.append(output))
    blocks_of(model)[3].register_forward_hook(lambda m, inputs, output: sum(low, output))
    model.model.norm.register_forward_hook(lambda m, inputs, output: low.clear())
    with pytest.raises(ValueError, match="its upper layers read more than the layer below"):
        check_branch(model, 2)


# ---- lora -----------------------------------------------------------------------------------------------------------


def test_lora_starts_at_zero_kl_and_holds_no_reference() -> None:
    engine = engine_of(**MODES["lora"])
    assert engine.reference is None
    metrics = engine.step(prompts(8)).metrics
    assert metrics["objective/kl"] == 0.0
    assert engine.step(prompts(8)).metrics["objective/kl"] != 0.0
    assert all("lora_" in name for name in engine.policy.names)
    base = dict(family().named_parameters())
    for name, p in engine.policy.module.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, base[name.replace(".base_layer", "")]), name


def test_lora_start_is_a_function_of_the_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b = (engine_of(run__seed=1, **MODES["lora"]) for _ in range(2))
    torch.manual_seed(3)
    assert all(torch.equal(p, q) for p, q in zip(a.policy.params, b.policy.params, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    c = engine_of(run__seed=2, **MODES["lora"])
    assert not all(torch.equal(p, q) for p, q in zip(a.policy.params, c.policy.params, strict=True))


@pytest.mark.parametrize(("targets", "each"), [(None, 7), (["q_proj", "v_proj"], 2), (["mlp.up_proj"], 1)])
def test_lora_targets(targets: list[str] | None, each: int) -> None:
    engine = engine_of(model__lora_targets=targets, **MODES["lora"])
    assert len(engine.policy.names) == 2 * each * DEPTH
    assert engine.policy.params[0].shape == (4, 32)


def test_adapters_come_back_after_an_error() -> None:
    engine = engine_of(**MODES["lora"])
    engine.step(prompts(8))
    ids = torch.tensor([[5, 6, 7]])
    before = engine.policy.module(ids).logits
    with adapters.adapters_off(engine.policy.module):
        assert largest(engine.policy.module(ids).logits, before) > 1e-3
    with pytest.raises(IndexError), adapters.adapters_off(engine.policy.module):
        engine.policy.module(torch.tensor([[VOCABULARY]]))
    assert torch.equal(engine.policy.module(ids).logits, before)
    assert all(p.requires_grad for p in engine.policy.params)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({**HYDRA, "model__trained_layers": 4}, ValueError, r"trained_layers is 4, but the policy has 4 .* to 1\.\.3"),
        ({**HYDRA, "model__trained_layers": 0}, ConfigError, r"model\.trained_layers must be at least 1, got 0"),
        ({"model__critic": "trunk"}, ConfigError, r"model\.critic=trunk .* set model\.train=hydra"),
        ({"model__critic": "trunk", "model__train": "lora"}, ConfigError, r"model\.train=lora has not"),
        ({**HYDRA, "model__reference": "x"}, ConfigError, r"model\.reference is set, .* leave model\.reference"),
        ({"model__train": "lora", "model__reference": "x"}, ConfigError, r"or set model\.train=full"),
        ({"model__train": "lora", "model__lora_targets": ["query"]}, ValueError, r"'query' is no linear .* q_proj"),
        ({"model__train": "lora", "model__lora_targets": ["lm_head"]}, ValueError, "'lm_head' is no linear layer"),
        ({"model__train": "lora", "model__lora_targets": []}, ConfigError, "names, or null for all"),
        ({"model__train": "lora", "model__lora_rank": 0}, ConfigError, r"model\.lora_rank must be at least 1"),
        ({"model__train": "lora", "model__lora_alpha": 0}, ConfigError, r"model\.lora_alpha must be above 0"),
        ({"model__train": "half"}, ConfigError, "one of full, lora, hydra"),
    ],
)
def test_bad_knobs_are_named(knobs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine_of(**knobs)


@pytest.mark.parametrize("mode", ["lora", "hydra"])
def test_reference_of_its_own_is_refused_where_it_is_shared(mode: str) -> None:
    with pytest.raises(ValueError, match=f"model.train: {mode} the reference is the policy's own start; pass refer"):
        Engine(family(), family(), None, tiny_reward(), small_config(**MODES[mode]))


def test_lora_without_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ppomax\[lora\]'"):
        engine_of(**MODES["lora"])


def test_branch_without_a_trunk_is_refused() -> None:
    engine = engine_of(**MODES["hydra, value branch"])
    roll = engine.rollout(prompts(4))
    with pytest.raises(ValueError, match="pass trunk="):
        state_values(engine.critic.module, roll.tokens, roll.cu_seqlens, roll.states)
    short = Branch(engine.policy.module, 1)
    with pytest.raises(ValueError, match="starts at block 1, the trunk ends at 2"):
        state_hidden(short, roll.tokens, roll.cu_seqlens, roll.states, roll.trunk)
    part = select_trunk(roll.trunk, roll.cu_seqlens, torch.tensor([0]))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N"):
        state_hidden(engine.policy.module, roll.tokens, roll.cu_seqlens, roll.states, part)
    with pytest.raises(ValueError, match=r"Branch: layers must be in 1\.\.3"):
        Branch(engine.policy.module, 4)
    with pytest.raises(ValueError, match="trunk of 2 blocks, the policy's has none"):
        Engine(family(), None, engine.critic.module, tiny_reward(), small_config())
