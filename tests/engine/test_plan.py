"""The plan against what real runs hold, its bytes by formulas, its advice, and the full-scale configurations."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from ppomax.cli import main
from ppomax.command.options import Options
from ppomax.config import ConfigError, RunConfig, config_names, load_config
from ppomax.config.stages import RewardModelConfig, SftConfig
from ppomax.data import Text
from ppomax.models import load_policy
from ppomax.models.adapters import add_adapters
from ppomax.models.recompute import recompute, recompute_blocks
from ppomax.planning.advice import most_parameters
from ppomax.planning.job import GiB, Job, roles
from ppomax.planning.memory import device_bytes, host_bytes, rollout
from ppomax.planning.plan import (
    _kept_row,
    job_of,
    make_plan,
    plan_here,
    plan_line,
    refuse_if_too_large,
    shape_of,
    stage_job_of,
)
from ppomax.planning.seconds import DEVICES, Assumptions, seconds
from ppomax.planning.steady import optimiser, weights
from ppomax.planning.trace import doubled, held, live_bytes, sizes_of
from ppomax.rollout import Sampling, decode
from ppomax.stages.sft import batch_nll
from ppomax.stages.supervised_loop import Task, run_loop
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, OPTConfig

from bench.planned import live_peaks, planned_peaks

from .families import FAMILIES, family
from .tiny import tiny_assets

WITHIN = 0.15
"""Between planned and measured peaks."""
SIZES = {
    "4M": dict(vocab_size=4096, hidden_size=192, intermediate_size=448, num_hidden_layers=8, num_attention_heads=6,
               num_key_value_heads=2, tie_word_embeddings=True),
    "30M": dict(vocab_size=8192, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
                num_key_value_heads=8),
    "100M": dict(vocab_size=16000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                 num_attention_heads=12, num_key_value_heads=12),
}  # fmt: skip
LLAMA_7B = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_13B = dict(
    vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
)


def shape(**knobs) -> str:
    return LlamaConfig(**{"num_key_value_heads": knobs["num_attention_heads"], **knobs}).to_json_string(use_diff=False)


def job(size: str = "4M", **knobs) -> Job:
    hf = shape(**SIZES[size])
    return Job(**{"policy": hf, "critic": hf, "reward": hf, **knobs})


# ---- against what a run holds ---------------------------------------------------------------------------------------


def measured(
    size: str, prompt: int | list[int], response: int, sequences: int, minibatch: int, micro: int, dtype: str,
    again: bool = False, adapters: bool = False, **others: Any,
):  # fmt: skip
    """Peaks of a real second step, by counting live storages: `live_bytes` sees what torch allocates, and not the
    scratch of C++ operators nor what the allocator keeps, so these are figures without noise. Also the plan's.
    `prompt`: tokens of each, or of all. `again`: with gradient checkpointing. `adapters`: of policy and critic, which
    stands on the reward model. `others`: knobs of the run."""
    knobs = {
        "batch": {"rollout_size": sequences, "minibatch_size": minibatch, "micro_tokens": micro},
        "rollout": {"max_new_tokens": response, "min_new_tokens": response, "allow_biased_sampling": True},
        "ptx": {"coef": 0.0},
        "model": {"dtype": dtype, "gradient_checkpointing": again}
        | ({"train": "lora", "critic_train": "lora"} if adapters else {}),
        "run": {"device": "cpu"},
    }
    lengths = [prompt] * sequences if isinstance(prompt, int) else prompt
    known = () if isinstance(prompt, int) else tuple(sorted(lengths))
    config = load_config(knobs, overrides={k.replace("__", "."): v for k, v in others.items()})
    hf = LlamaConfig(max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES[size])
    planned = planned_peaks(
        job(size, dtype=dtype, cpu=True, prompt_tokens=max(lengths), prompt_lengths=known, padded=dtype != "float32",
            response_tokens=response, rollout_size=sequences, minibatch_size=minibatch, micro_tokens=micro,
            slots=config.rollout.slots, gradient_checkpointing=again, frozen_bits=config.model.frozen_bits,
            kept_row=_kept_row(config, shape(**SIZES[size])), whole_kl=config.kl.estimator == "vocabulary",
            **(dict(train="lora", lora_rank=16, borrowing_critic=True) if adapters else {}))
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 4000, (n,), generator=generator).tolist() for n in lengths]
    return live_peaks(lambda: LlamaForCausalLM(hf).to(getattr(torch, dtype)), config, prompts), planned


@pytest.mark.parametrize(
    ("size", "prompt", "response", "sequences", "minibatch", "micro", "dtype"),
    [
        ("4M", 16, 8, 16, 8, 96, "float32"),  # weights and optimiser lead
        ("4M", 16, 8, 8, 8, 64, "bfloat16"),
        ("30M", 12, 4, 4, 2, 16, "float32"),
        pytest.param("30M", 64, 32, 16, 8, 512, "float32", marks=pytest.mark.slow),
        pytest.param("100M", 16, 16, 8, 4, 64, "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_planned_peaks_are_those_of_real_steps(size, prompt, response, sequences, minibatch, micro, dtype, again):
    got, planned = measured(size, prompt, response, sequences, minibatch, micro, dtype, again)
    for phase, there in got.items():
        assert planned[phase] == pytest.approx(there, rel=WITHIN), f"{phase}: planned {planned[phase]}, there {there}"


@pytest.mark.parametrize("again", [False, True])
def test_adapters_on_borrowed_weights_are_planned_as_they_run(again):
    got, planned = measured("4M", 48, 16, 16, 16, 4096, "float32", again, adapters=True)
    for phase in ("load", "rollout", "update"):
        assert planned[phase] == pytest.approx(got[phase], rel=WITHIN), phase


@pytest.mark.parametrize("bits", [8, 4])
def test_frozen_weights_in_few_bits_are_planned_as_they_lie(bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    got, planned = measured("4M", 48, 16, 16, 16, 4096, "float32", adapters=True, model__frozen_bits=bits)
    for phase in ("rollout", "update"):
        assert planned[phase] == pytest.approx(got[phase], rel=WITHIN), phase


@pytest.mark.parametrize(
    "knobs",
    [
        {"rollout__top_p": 0.9, "rollout__allow_biased_sampling": False},
        {"rollout__top_k": 40, "rollout__allow_biased_sampling": False},
        {"kl__estimator": "vocabulary"},
    ],
    ids=["sets as bits", "sets as ids", "KL over the vocabulary"],
)
def test_what_is_scored_in_plain_torch_is_planned_as_it_runs(knobs):
    got, planned = measured("4M", 16, 64, 16, 16, 4096, "float32", **knobs)
    for phase in ("rollout", "update"):
        assert planned[phase] == pytest.approx(got[phase], rel=WITHIN), phase


@pytest.mark.parametrize("knobs", [{}, {"model__gradient_checkpointing": True}], ids=["plain", "again"])
@pytest.mark.parametrize("micro", [384, 1024])
def test_uneven_texts_are_planned_by_their_lengths(micro, knobs):
    """One prompt sixteen times as long as most; and what all at the limit would have been taken for."""
    lengths = [16] * 11 + [40, 64, 100, 180, 256]
    got, planned = measured("4M", lengths, 16, 16, 16, micro, "float32", bool(knobs))
    for phase in ("rollout", "update"):
        assert 0.95 * got[phase] <= planned[phase] <= 1.15 * got[phase], phase


def test_lengths_of_the_users_own_prompts_are_read(tmp_path):
    known = tiny_assets(tmp_path)
    config = load_config(overrides={**known, "data.max_prompt_tokens": 6, "data.overlong": "truncate"})
    made, _ = job_of(config, ranks=1, memory=GiB, host_memory=GiB, cpu=True)
    assert len(made.prompt_lengths) == 12
    assert (made.prompt_lengths[-1], made.prompt_tokens) == (6, 6)
    assert made.mean_prompt < 6
    (tmp_path / "prompts.jsonl").write_text("no json")
    assert job_of(config, ranks=1, memory=GiB, host_memory=GiB)[0].prompt_lengths == ()
    elsewhere = load_config(overrides={**known, "data.prompts": "a/hub-name"})
    assert job_of(elsewhere, ranks=1, memory=GiB, host_memory=GiB)[0].prompt_lengths == ()


def test_a_model_that_looks_for_its_pad_token_is_planned():
    hf = GPT2Config(n_embd=32, n_layer=3, n_head=2, pad_token_id=0).to_json_string(use_diff=False)
    assert device_bytes(Job(policy=hf, critic=hf, reward=hf, cpu=True))["update"]["activations"] > 0


def test_adapters_on_layers_of_another_kind_are_planned():
    """GPT-2's products are Conv1D."""
    hf = GPT2Config(n_embd=32, n_layer=3, n_head=2).to_json_string(use_diff=False)
    planned = Job(policy=hf, critic=hf, reward=hf, cpu=True, train="lora", lora_rank=4)
    assert device_bytes(planned)["update"]["activations"] > 0
    per_block = 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))  # c_attn, c_proj, c_fc, c_proj
    assert next(r for r in roles(planned) if r.name == "policy").trained == 3 * per_block


@pytest.mark.parametrize("again", [False, True])
def test_what_a_phase_adds_is_planned_too(again):
    """Weights and optimiser are easily right; so what comes on top of them is held against a run by itself, where
    activations lead and one micro-batch is all. With gradient checkpointing too, where little of them is left. Our
    kernels hold less of them than transformers' blocks, which are what is traced: so more is planned, not less."""
    got, planned = measured("4M", 48, 16, 24, 24, 4096, "float32", again)
    n, m = (sizes_of(shape(**SIZES["4M"]), kind).params for kind in ("causal_lm", "scorer"))
    steady = 4 * 2 * (n + m) + 8 * (n + m)
    assert (got["update"] > 2 * steady) != again
    for phase in ("rollout", "update"):
        assert planned[phase] == pytest.approx(got[phase], rel=WITHIN), phase
        assert planned[phase] >= 0.95 * got[phase], phase
        assert 0.9 <= (planned[phase] - steady) / (got[phase] - steady) <= 1.25, phase


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_activations_of_a_real_forward_and_backward(kind, again):
    """Depths that are drawn out in a straight line: five blocks, from what two and three hold."""
    hf = {
        "llama": LlamaConfig(**{**SIZES["4M"], "num_hidden_layers": 5}),
        "gpt2": GPT2Config(vocab_size=512, n_embd=64, n_layer=5, n_head=4, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
        "opt": OPTConfig(vocab_size=512, hidden_size=64, ffn_dim=128, num_hidden_layers=5, num_attention_heads=4,
                         word_embed_proj_dim=64, dropout=0.0),
    }[kind]  # fmt: skip
    trunk = AutoModelForCausalLM.from_config(hf).base_model
    for p in trunk.parameters():
        p.grad = torch.zeros_like(p)
    if again:
        recompute(next(m for m in trunk.modules() if isinstance(m, torch.nn.ModuleList)))
    ids = torch.zeros(2, 64, dtype=torch.int64)
    with live_bytes() as live:
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
        saved = live.now
        hidden.backward(torch.ones_like(hidden))
    planned = held(hf.to_json_string(use_diff=False), "float32", 2, 64, 5, None, again)
    assert planned.saved == pytest.approx(saved, rel=WITHIN)
    assert planned.peak == pytest.approx(live.peak, rel=WITHIN)


# ---- by formula -----------------------------------------------------------------------------------------------------


def test_the_largest_policy_that_decodes_whole_fills_the_memory():
    """A policy of that many parameters takes what there is, and one of half as many fits."""
    seven = shape(**LLAMA_7B)
    job = Job(policy=seven, critic=seven, reward=seven, zero_stage=3, ranks=8, memory=80 * 2**30)
    most = most_parameters(job)
    one = sizes_of(seven, "causal_lm")
    depth = one.layers + round((most - one.params) / one.block)
    deeper = shape(**{**LLAMA_7B, "num_hidden_layers": depth})
    rollout = sum(device_bytes(replace(job, policy=deeper, slots=1))["rollout"].values())
    assert rollout == pytest.approx(job.memory, rel=0.02)
    assert depth > one.layers
    less = replace(job, memory=40 * 2**30)
    assert most_parameters(less) < most
    assert doubled(json.dumps({"num_hidden_layers": 2, "layer_types": ["a", "b"]})) == json.dumps(
        {"num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"]}
    )


def test_seconds_of_checkpoints_follow_the_rates() -> None:
    job = job_of(load_config("llama-7b"), ranks=8, memory=80 * GiB, host_memory=1024 * GiB)[0]
    plan = make_plan(job, DEVICES["h100"], advise=False)
    saves, share = plan.saves, plan.host["checkpoint copies"] / 8
    assert saves.state == plan.host["checkpoint copies"]
    assert saves.written == pytest.approx(saves.state / 2e9)  # disk-bound
    assert saves.still == pytest.approx(share / (64e9 * 0.7))  # the copy to the host
    assert saves.to_next_step == pytest.approx(20 + saves.models + saves.read)
    fast = make_plan(job, DEVICES["h100"], Assumptions(disk=1e12), advise=False).saves
    policy = sizes_of(job.policy, "causal_lm").params
    assert fast.written == pytest.approx(12 * policy / 8 / 1.3e9)  # hash-bound, by the policy's optimiser
    assert share > 2 * 12 * policy / 8
    assert fast.models < saves.models / 400
    beside = make_plan(replace(job, background_saves=False), DEVICES["h100"], advise=False).saves
    assert beside.still == beside.written
    adapters = job_of(load_config("llama-7b-lora"), ranks=8, memory=80 * GiB, host_memory=1024 * GiB)[0]
    assert make_plan(adapters, DEVICES["h100"], advise=False).saves.state < saves.state / 50
    assert make_plan(job, advise=False).saves is None


def test_partitions_are_the_published_arithmetic():
    """16 bytes a trained parameter and 2 a frozen one, over 8 ranks (weights, gradients, AdamW; all under ZeRO-3)."""
    seven = shape(**LLAMA_7B)
    big = Job(policy=seven, critic=seven, reward=seven, zero_stage=3, ranks=8)
    n, m = sizes_of(seven, "causal_lm").params, sizes_of(seven, "scorer").params
    assert n == 6_738_415_616
    assert sum(weights(big).values()) == pytest.approx(2 * (2 * n + 2 * m) / 8, abs=8)
    assert optimiser(big)["optimiser"] == pytest.approx(12 * (n + m) / 8, abs=8)
    two = replace(big, zero_stage=2)
    assert sum(weights(two).values()) == 8 * sum(weights(big).values())
    assert optimiser(two) == optimiser(big)
    assert optimiser(replace(big, offload_optimizer=True))["optimiser"] == 0
    more = sum(device_bytes(replace(big, hpz=4))["load"].values()) - sum(device_bytes(big)["load"].values())
    assert more == pytest.approx(1.05 * 2 * (2 * n + 2 * m) / 4, rel=1e-6)  # with what is lost between blocks
    assert optimiser(replace(big, zero_stage=None, ranks=1))["optimiser"] == 12 * (n + m)
    assert optimiser(replace(big, zero_stage=None, ranks=1, dtype="float32"))["optimiser"] == 8 * (n + m)


def test_the_cache_of_a_7b_model():
    seven = shape(**LLAMA_7B)
    run = Job(policy=seven, critic=None, reward=None, train="hydra", slots=16, rollout_size=16)
    size = 16 * 1024 * 2 * 32 * 4096 * 2  # the last response token is never taken in, but its page is
    assert device_bytes(run)["rollout"]["KV cache"] == size


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rollout_takes_the_bytes_that_were_planned(dtype: str, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights and KV cache: told before the rollout, planned before the run, and really allocated."""
    prompt_tokens, new, slots = 21, 12, 8
    knobs = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**knobs)).to(getattr(torch, dtype)).eval()
    decoding, packing = (importlib.import_module(f"ppomax.rollout.{name}") for name in ("decode", "packed_weights"))
    arenas, panels = [], []

    class Watched(decoding.Arena):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            arenas.append(sum(pages.nbytes for store in self.stores for pages in store))

    def pack(weight):
        panels.append(packed := PACK(weight))
        return packed

    PACK = packing.pack
    monkeypatch.setattr(decoding, "Arena", Watched)
    monkeypatch.setattr(packing, "pack", pack)
    told = []
    prompts = [[3 + i] * prompt_tokens for i in range(16 // each) for _ in range(each)]
    sampling = Sampling(new, slots=slots)
    decode(model, prompts, range(16), sampling, eos_ids=[], announce=told.append)
    taken = {"KV cache": arenas[0], "packed weights": sum(p.nbytes for p in panels)}
    assert taken["packed weights"] > 0
    assert {"KV cache": told[0].arena_bytes, "packed weights": told[0].packed_bytes} == taken
    planned = rollout(
        Job(policy=shape(**knobs), critic=None, reward=None, dtype=dtype, cpu=True, prompt_tokens=prompt_tokens,
            response_tokens=new, slots=slots, rollout_size=16, samples_per_prompt=each)
    )  # fmt: skip
    assert {kind: planned[kind] for kind in taken} == taken


def test_modes_train_and_hold_what_they_should():
    full = {r.name: r for r in roles(job())}
    lora = {r.name: r for r in roles(job(train="lora", lora_rank=4))}
    hydra = {r.name: r for r in roles(job(train="hydra", trained_layers=2, critic=None))}
    c = full["policy"].sizes
    assert lora["reference"].elements == 0
    assert lora["policy"].trained == 4 * 8 * (6 * 192 + 2 * 64 + 3 * (192 + 448)) + 0 * c.params
    assert hydra["policy"].trained == hydra["reference"].elements == 2 * c.block + 192
    assert full["policy"].trained == full["reference"].elements == c.params
    peaks = [max(sum(k.values()) for k in device_bytes(job(train=t, critic=c)).values())
             for t, c in (("full", job().critic), ("hydra", None))]  # fmt: skip
    assert peaks[1] < peaks[0]


def test_time_falls_with_devices_and_faster_ones():
    seven = shape(**LLAMA_7B)
    one = Job(policy=seven, critic=seven, reward=seven, zero_stage=3, ranks=8)
    a100, h100 = (sum(seconds(one, DEVICES[name]).values()) for name in ("a100-80g", "h100"))
    sixteen = sum(seconds(replace(one, ranks=16, ranks_per_node=16), DEVICES["a100-80g"]).values())
    assert h100 < a100
    assert sixteen < a100
    times = seconds(replace(one, offload_optimizer=True), DEVICES["a100-80g"])
    assert times["step"] > seconds(one, DEVICES["a100-80g"])["step"]


# ---- advice and refusal ---------------------------------------------------------------------------------------------


def test_each_piece_of_advice_is_what_planning_with_it_gives():
    thirteen = shape(**LLAMA_13B)
    big = Job(policy=thirteen, critic=thirteen, reward=thirteen, zero_stage=3, ranks=8, micro_tokens=4096)
    plan = make_plan(big)
    assert not plan.fits
    advice = {a.knob: a for a in plan.advice}
    there = advice["--sharding.offload_optimizer true"]
    turned = make_plan(replace(big, offload_optimizer=True), advise=False)
    assert (there.saves, there.fits) == (plan.peak - turned.peak, turned.fits) == (plan.peak - turned.peak, True)
    order = [(not a.fits, -a.saves) for a in plan.advice]
    assert order == sorted(order)
    assert all(a.saves > 0 for a in plan.advice)


def test_gradient_checkpointing_is_advised_where_activations_lead():
    seven = shape(**LLAMA_7B)
    big = Job(policy=seven, critic=seven, reward=seven, zero_stage=3, ranks=8, micro_tokens=16384)
    big = replace(big, memory=make_plan(big, advise=False).peak - GiB)
    plan = make_plan(big)
    assert (plan.fits, plan.peak_phase) == (False, "update")
    assert {a.knob: a.fits for a in plan.advice}["--model.gradient_checkpointing true"]
    turned = replace(big, gradient_checkpointing=True)
    assert device_bytes(turned)["update"]["activations"] < device_bytes(big)["update"]["activations"] / 8
    slower, quicker = (seconds(j, DEVICES["a100-80g"])["update"] for j in (turned, big))
    assert quicker < slower < 4 / 3 * quicker


def test_a_run_that_cannot_fit_is_refused_with_the_mend(tmp_path, monkeypatch):
    monkeypatch.setattr("ppomax.planning.plan.free_host_memory", lambda: GiB)
    config = load_config(overrides={"run.device": "cpu", "batch.micro_tokens": 60_000})
    with pytest.raises(ConfigError, match=r"needs .* GiB \(update\) and there are 1.0 GiB; --\S+ .* saves"):
        plan_line(config)
    assert "plan: " in plan_line(replace(config, run=replace(config.run, ignore_plan=True)))


def test_train_refuses_before_it_loads_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ppomax.planning.plan.free_host_memory", lambda: GiB // 2)
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), "--run.device", "cpu"]) == 2
    assert "--run.ignore_plan true starts the run" in capsys.readouterr().err
    assert not out.exists()


def test_too_little_host_memory_is_named():
    thirteen = shape(**LLAMA_13B)
    big = Job(policy=thirteen, critic=thirteen, reward=thirteen, zero_stage=3, ranks=8, offload_optimizer=True)
    plan = make_plan(replace(big, host_memory=64 * GiB), advise=False)
    assert plan.peak <= plan.job.memory
    with pytest.raises(ConfigError, match="host memory of a node"):
        refuse_if_too_large(plan)


def test_the_default_run_fits_and_is_planned_on_this_machine():
    plan = plan_here(load_config(overrides={"run.device": "cpu"}))
    assert plan.fits
    assert plan.job.cpu
    assert not plan.host


def test_unknown_models_and_flags_are_named(capsys, tmp_path):
    with pytest.raises(ConfigError, match=r"holds neither config\.json"):
        shape_of(str(tmp_path))
    for argv, words in (
        (["--gpus", "0"], "--gpus must be above 0"),
        (["--device", "tpu"], "(known: a100-80g, h100, h200, mi300x;"),
        (["--bandwidth", "-3"], "--bandwidth must be above 0"),
        (["--gpus", "many"], "--gpus must be a number, or auto, got 'many'"),
    ):
        assert main(["plan", *argv]) == 2
        assert words in capsys.readouterr().err


# ---- the full-scale configurations ----------------------------------------------------------------------------------


LAPTOP = "smollm2-135m"
ONE_GPU = [name for name in config_names() if name.endswith("-one-gpu")]
AT_SCALE = [name for name in config_names() if name not in (LAPTOP, *ONE_GPU)]


def test_there_are_configs_of_three_models_in_three_modes():
    modes = ("", "-lora", "-hydra")
    names = sorted(f"{m}{mode}" for m in ("llama-7b", "llama-13b", "qwen-7b") for mode in modes)
    assert sorted([*names, LAPTOP, *ONE_GPU]) == config_names()
    assert ONE_GPU == ["llama-7b-one-gpu", "qwen-7b-one-gpu"]


def test_adapters_save_what_they_should():
    """Policy, reference and critic are one set of weights."""
    for knobs, memory, most in (
        ({}, 80, 35),
        ({}, 40, 40),
        ({"sharding.zero_stage": None, "sharding.frozen": "whole"}, 80, 80),
    ):
        name = "llama-7b-hydra" if knobs else "llama-7b-lora"
        where = {"ranks": 1 if knobs else 8, "memory": memory * GiB, "host_memory": 1024 * GiB}
        plan = make_plan(job_of(load_config(name, overrides=knobs), **where)[0], advise=False)
        assert plan.fits
        assert plan.peak <= most * GiB


def test_idle_models_are_counted_where_they_lie() -> None:
    """Policy 13 GiB, reward model and critic as large, one GPU."""
    whole = {"sharding.zero_stage": None, "sharding.frozen": "whole", "model.critic": "reward_model"}
    where = {"ranks": 1, "memory": 80 * GiB, "host_memory": 1024 * GiB}
    on, off = (
        make_plan(job_of(load_config("llama-7b-lora", overrides=whole | {"sharding.idle": at}), **where)[0])
        for at in ("device", "host")
    )
    scorer = on.phases["load"]["reward weights"]
    assert off.phases["rollout"]["reward weights"] == 0
    assert off.phases["rollout"]["critic weights"] == 0
    assert off.phases["rollout"]["optimiser"] < on.phases["rollout"]["optimiser"]
    assert off.phases["update"]["reward weights"] == scorer, "the critic stands on it"
    assert off.phases["update"]["optimiser"] == on.phases["update"]["optimiser"]
    assert off.host["idle models"] > scorer
    alone = whole | {"model.critic_train": "full", "sharding.idle": "host"}
    phases = make_plan(job_of(load_config("llama-7b-lora", overrides=alone), **where)[0]).phases
    assert phases["update"]["reward weights"] == 0
    assert phases["update"]["critic weights"] == pytest.approx(scorer, rel=0.01)
    assert any(a.knob == "--sharding.idle host" for a in on.advice)


@pytest.mark.parametrize("name", ONE_GPU)
def test_a_7b_model_is_trained_on_one_gpu(name):
    """Policy, reference, critic and reward model are two sets of weights; with a reward function one."""
    where = {"ranks": 1, "host_memory": 64 * GiB}
    both = make_plan(job_of(load_config(name), memory=48 * GiB, **where)[0], advise=False)
    function = {"reward.function": "f.py:f", "model.critic": "policy"}
    one = make_plan(job_of(load_config(name, overrides=function), memory=32 * GiB, **where)[0], advise=False)
    assert both.fits
    assert one.fits
    weights = [sum(x for kind, x in plan.phases["update"].items() if kind.endswith("weights")) for plan in (both, one)]
    assert weights[0] == pytest.approx(2 * weights[1], rel=0.1)


def test_the_laptop_s_config_fits_a_laptop():
    planned, _ = job_of(load_config(LAPTOP), ranks=1, memory=4 * GiB, host_memory=4 * GiB, cpu=True)
    assert make_plan(planned, advise=False).fits
    assert sizes_of(planned.policy, "causal_lm").params == 134_515_008


@pytest.mark.parametrize("command", ["sft", "reward-model"])
@pytest.mark.parametrize("name", ["llama-7b", "qwen-7b"])
def test_a_full_scale_config_of_a_stage_fits_its_node(command, name):
    assert config_names(command) == ["llama-7b", "qwen-7b"]
    kind = {"sft": SftConfig, "reward-model": RewardModelConfig}[command]
    config = Options(command, kind, {}).parse(["--config", name, "--data", "rows.jsonl"])
    planned, _ = stage_job_of(config, ranks=8, memory=80 * GiB, host_memory=1024 * GiB)
    plan = make_plan(planned, DEVICES["a100-80g"])
    assert plan.fits
    assert {a.knob for a in plan.advice} >= {"--train lora", "--micro_tokens 4096", "--sharding.offload_param true"}
    assert list(plan.times) == ["update", "step"]


@pytest.mark.parametrize("knobs", [{}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}, {"train": "lora"}])
def test_a_stage_is_planned_as_it_runs(knobs, tmp_path):
    """What fine-tuning holds at its peak, activations leading, by counting live storages."""
    torch.manual_seed(0)
    hf = LlamaConfig(max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES["4M"])
    LlamaForCausalLM(hf).save_pretrained(tmp_path / "start")
    texts = [Text(torch.randint(4, 4000, (64,)).tolist(), 1) for _ in range(16)]
    run = RunConfig(steps=3, device="cpu", out=str(tmp_path / "run"))
    sizes = {"batch_tokens": 1024, "micro_tokens": 512, "max_tokens": 64}
    config = SftConfig(model=str(tmp_path / "start"), data="", impl="ref", run=run, **sizes, **knobs)
    planned, _ = stage_job_of(config, ranks=1, memory=GiB, host_memory=GiB, cpu=True)
    want = device_bytes(planned)
    with live_bytes() as live:
        model = load_policy(LlamaForCausalLM(hf), getattr(torch, config.dtype))  # weights read from files are not seen
        if config.train == "lora":
            add_adapters(model, config)
        if config.gradient_checkpointing:
            recompute_blocks(model)
        live.peak = live.now

        def loss_of(model, rows, batch):
            return batch_nll(model, [texts[row] for row in rows], normalizer=1000.0), {}

        run_loop(model, Task([64] * 16, loss_of, lambda module: {}), config, tmp_path / "run")
        got = live.peak
    phases = {phase: sum(kinds.values()) - kinds["overhead"] for phase, kinds in want.items()}
    assert max(phases["update"], phases["step"]) == pytest.approx(got, rel=WITHIN)


def test_a_stage_that_cannot_fit_is_refused_before_it_reads_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ppomax.planning.plan.free_host_memory", lambda: GiB)
    words = ["sft", "--config", "llama-7b", "--data", "none.jsonl", "--run.device", "cpu", "--out", str(tmp_path / "r")]
    assert main(words) == 2
    assert "this run needs" in capsys.readouterr().err


@pytest.mark.parametrize("name", AT_SCALE)
def test_a_full_scale_config_fits_its_node(name):
    config = load_config(name)
    assert (config.batch.rollout_size, config.batch.minibatch_size) == (128, 32)
    assert (config.kl.coef, config.advantage.lam, config.reward.clip) == (0.05, 0.9, 0.8)
    assert config.model.dtype == "bfloat16"
    assert config.model.train == (name.split("-")[2] if name.count("-") == 2 else "full")
    if config.model.train == "full":
        assert (config.policy_optim.lr, config.critic_optim.lr) == (5e-7, 1.65e-6)
    planned, notes = job_of(config, ranks=8, memory=80 * GiB, host_memory=1024 * GiB)
    plan = make_plan(planned, advise=False)
    assert plan.fits, (plan.peak / GiB, plan.host)
    assert notes == ("model.reward_model is not set: planned as large as the policy",)
    params = sizes_of(planned.policy, "causal_lm").params
    assert params == pytest.approx(
        {"llama-7b": 6.74e9, "llama-13b": 13.0e9, "qwen-7b": 7.62e9}[name[: name.find("b") + 1]], rel=2e-3
    )
    assert plan.phases["rollout"]["KV cache"] > GiB / 4


@pytest.mark.parametrize("knobs", [LLAMA_7B, LLAMA_13B])
def test_models_of_that_size_are_built_without_memory(knobs):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**knobs), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == sizes_of(shape(**knobs), "causal_lm").params
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_plan_command_prints_tables_and_plain_data(capsys):
    assert main(["plan", "--config", "llama-7b", "--gpus", "8", "--memory", "80"]) == 0
    out = capsys.readouterr().out
    assert "fits: " in out
    assert "optimiser" in out
    assert main(["plan", "--config", "llama-7b", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["fits"] is True
    assert data["peak_bytes"] == sum(data["bytes"][data["peak_phase"]].values())
    with pytest.raises(SystemExit) as told:
        main(["plan", "--config", "llama-7b", "--gpus", "8", "--memory", "40"])
    assert told.value.code == 3
    assert "does NOT fit" in capsys.readouterr().out


def test_plan_command_takes_this_machine_as_it_is(capsys, monkeypatch):
    assert main(["plan", "--gpus", "auto"]) == 0
    out = capsys.readouterr().out
    assert "1 x " in out
    assert "seconds" not in out  # no figures of a GPU that is not there
    card = type("Card", (), {"total_memory": 24 * GiB})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: card)
    with pytest.raises(SystemExit):
        main(["plan", "--config", "llama-7b", "--gpus", "auto"])
    assert "4 x 24.0 GiB" in capsys.readouterr().out
    for word, message in (("many", "must be a number, or auto, got 'many'"), ("0", "--gpus must be above 0, got 0")):
        assert main(["plan", "--gpus", word]) == 2
        assert message in capsys.readouterr().err


def test_a_config_may_stand_on_another(tmp_path):
    (tmp_path / "a.yaml").write_text("base: llama-7b\nrun: {steps: 7}\n")
    config = load_config(tmp_path / "a.yaml")
    assert (config.run.steps, config.sharding.zero_stage, config.preset) == (7, 3, "paper")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path / 'b.yaml'}\n")
    with pytest.raises(ConfigError, match="in a circle"):
        load_config(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("base: [1]\n")
    with pytest.raises(ConfigError, match="base in"):
        load_config(tmp_path / "c.yaml")


def test_comparison_shows_both_figures(capsys):
    from ppomax.planning.compare import published

    rows = published()
    assert {row.engine.split(",")[0] for row in rows} == {"DeepSpeed-Chat", "OpenRLHF"}
    assert main(["plan", "--compare"]) == 0
    out = capsys.readouterr().out
    assert "4.10 h" in out
    assert "Differs" in out
    ours, plan = rows[0].ours()
    assert ours > 0
    assert plan.fits


# ---- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_a_saved_folder_of_every_family_is_planned_whatever_its_depth(tmp_path, name, depth):
    """transformers writes a type for each block into the configuration, so that their number must fit."""
    model = family(name)
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    key = "n_layer" if "n_layer" in found else "num_hidden_layers"
    if "layer_types" in found:
        found["layer_types"] = [found["layer_types"][i % 3] for i in range(depth)]
    (tmp_path / "config.json").write_text(json.dumps({**found, key: depth}))
    shape = shape_of(str(tmp_path))
    assert sizes_of(shape, "causal_lm").layers == depth
    deep = held(shape, "float32", 2, 8, depth, None)
    assert deep.saved > 0
    knobs = {"model.policy": str(tmp_path), "reward.function": "math:sqrt", "data.prompts": "x", "ptx.coef": 0,
             "model.critic": "policy", "rollout.max_new_tokens": 8, "data.max_prompt_tokens": 8}  # fmt: skip
    room = 64 << 30
    job, _ = job_of(load_config(overrides=knobs), ranks=1, memory=room, host_memory=room, cpu=True)
    assert 0 < make_plan(job, advise=False, notes=[]).peak < room


def test_a_failed_estimate_stops_no_run_that_ignores_the_plan(monkeypatch):
    def fails(config):
        raise TypeError("no such block")

    monkeypatch.setattr("ppomax.planning.plan.plan_here", fails)
    with pytest.raises(
        ConfigError, match=r"the estimate failed \(TypeError: no such block\); set run.ignore_plan=true"
    ):
        plan_line(load_config())
    assert "plan: none, the estimate failed" in plan_line(load_config(overrides={"run.ignore_plan": True}))


def test_another_sampler_takes_its_share_of_the_card_while_it_draws_and_a_copy_on_the_host() -> None:
    ours, theirs = job(), job(sampler_memory=0.25)
    assert device_bytes(theirs)["rollout"]["sampler"] == int(0.25 * theirs.memory)
    assert "KV cache" not in device_bytes(theirs)["rollout"]
    assert device_bytes(theirs)["update"] == device_bytes(ours)["update"]
    policy = sizes_of(ours.policy, "causal_lm").params * ours.width
    assert host_bytes(theirs)["sampler"] >= policy
    assert "sampler" not in host_bytes(ours)
    on_cpu = device_bytes(job(cpu=True, sampler_memory=0.25))
    assert all(kinds["sampler"] >= policy for kinds in on_cpu.values())
