"""Frozen weights in 8 and 4 bits: one model for sampling, scoring, update and export; near the whole one; smaller."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ppomax.config import ConfigError, ModelConfig, load_config
from ppomax.engine import Engine
from ppomax.models.frozen_bits import FrozenLinear, place
from ppomax.saving.export_policy import export_policy
from ppomax.saving.folder import CheckpointError
from ppomax.saving.model_folder import save_model
from ppomax.saving.saved_policy import saved_policy
from torch import nn
from transformers import AutoModelForCausalLM

from tests.engine.families import family
from tests.engine.tiny import prompts, small_config, tiny_policy, tiny_reward, tiny_tokenizer

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
BITS = [8, 4]
LORA: dict[str, Any] = {"model__train": "lora", "model__lora_rank": 4}
MODES: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "model__critic": "policy", "model__critic_train": "lora"},
    "hydra": {"model__train": "hydra", "model__trained_layers": 1, "model__critic": "trunk"},
    "full": {"model__critic": "policy"},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    out = tmp_path_factory.mktemp("models")
    policy = save_model(tiny_policy(), tiny_tokenizer(), out / "policy")
    return str(policy), str(save_model(tiny_reward(), None, out / "reward"))


def engine_of(paths: tuple[str, str], bits: int | None, **knobs: Any) -> Engine:
    return Engine(paths[0], None, None, paths[1], small_config(model__frozen_bits=bits, **knobs))


def in_bits(model: nn.Module) -> list[FrozenLinear]:
    return [m for m in model.modules() if isinstance(m, FrozenLinear)]


def layer(bits: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, FrozenLinear]:
    torch.manual_seed(bits)
    whole = nn.Linear(192, 96, bias=bias).to(dtype).requires_grad_(False)
    return whole, FrozenLinear(whole, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_is_near_and_small(bits: int, dtype: torch.dtype) -> None:
    whole, small = layer(bits, dtype)
    error = (small.weight.float() - whole.weight.float()).abs()
    row = whole.weight.float().abs().amax(1, keepdim=True)
    if bits == 8:  # half a step of 127, float16's rounding before it and the dtype's after
        assert (error <= row * (0.5 / 127 + 2**-10 + (2**-8 if dtype == torch.bfloat16 else 0))).all()
    else:  # half of the widest gap between the sixteen values, -1 and -0.696
        assert (error <= row * 0.16).all()
    assert small.weight.dtype == dtype
    assert small.stored_bytes <= small.whole_bytes * (bits + 0.6) / (8 * dtype.itemsize)
    assert not list(small.parameters(recurse=False))[1:]
    assert small.bias is whole.bias


@pytest.mark.parametrize("bits", BITS)
def test_a_product_and_its_gradient_are_those_of_the_made_weight(bits: int) -> None:
    _, small = layer(bits)
    x = torch.randn(5, 3, 192, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    out, want = small(x), nn.functional.linear(twin, small.weight, small.bias)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    want.backward(gradient)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.parametrize("bits", BITS)
def test_a_cast_leaves_codes_and_scales(bits: int) -> None:
    _, small = layer(bits)
    codes, scales = small.codes.clone(), small.scales.clone()
    cast = copy.deepcopy(small).to(torch.bfloat16)
    assert cast.weight.dtype == torch.bfloat16
    assert cast.scales.dtype == torch.float32
    assert torch.equal(cast.codes, codes)
    assert torch.equal(cast.scales, scales)
    torch.testing.assert_close(cast.weight.float(), small.weight, rtol=2**-8, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_the_first_step_starts_from_ratio_1_and_the_right_kl(paths: tuple[str, str], bits: int, mode: str) -> None:
    engine = engine_of(paths, bits, policy_optim__lr=1e-2, **MODES[mode])
    first = engine.step(prompts(8)).metrics
    again = engine.step(prompts(8)).metrics
    for metrics in (first, again):
        assert metrics["val/first_ratio_gap"] == 0
        assert metrics["val/skipped"] == 0
    if mode == "full":  # the reference is the policy's start, rounded
        assert 0 < abs(first["objective/kl_per_token"]) < 0.1
    else:
        assert first["objective/kl_per_token"] == 0
    assert again["objective/kl_per_token"] != first["objective/kl_per_token"]
    trained = in_bits(engine.policy.module)
    assert len(trained) == {"lora": 14, "hydra": 7, "full": 0}[mode]
    assert len(in_bits(engine.reward_model)) == 14
    assert all(not p.requires_grad for m in trained for p in m.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_exported_gives_the_policy_s_logits(
    paths: tuple[str, str], bits: int, mode: str, tmp_path: Path
) -> None:
    engine = engine_of(paths, bits, policy_optim__lr=1e-2, **MODES[mode])
    engine.step(prompts(8))
    export_policy(engine, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not in_bits(plain)
    tokens = torch.tensor([prompts(1)[0]])
    with torch.no_grad():
        want = engine.policy.module.eval()(tokens).logits
        torch.testing.assert_close(plain(tokens).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["lora", "hydra"])
def test_a_checkpoint_goes_on_to_the_bit_and_is_opened_without_an_engine(
    paths: tuple[str, str], mode: str, tmp_path: Path
) -> None:
    engine = engine_of(paths, 8, **MODES[mode])
    engine.step(prompts(8))
    engine.save(tmp_path / "step")
    tokens = torch.tensor([prompts(1)[0]])
    with torch.no_grad():
        opened = saved_policy(tmp_path / "step").model(tokens).logits
        assert torch.equal(opened, engine.policy.module(tokens).logits)
    want = engine.step(prompts(8))
    other = engine_of(paths, 8, **MODES[mode])
    other.restore(tmp_path / "step")
    assert torch.equal(other.step(prompts(8)).scores, want.scores)
    with pytest.raises(CheckpointError, match="another policy"):
        engine_of(paths, 4, **MODES[mode]).restore(tmp_path / "step")


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_other_families_train_so(name: str, paths: tuple[str, str]) -> None:
    config = small_config(model__frozen_bits=8, **MODES["lora"])
    engine = Engine(family(name), None, None, tiny_reward(), config)
    assert in_bits(engine.policy.module)
    assert engine.step(prompts(8)).metrics["val/first_ratio_gap"] == 0


def test_a_critic_that_is_trained_whole_starts_from_files(paths: tuple[str, str]) -> None:
    whole, small = engine_of(paths, None), engine_of(paths, 8)
    ours, theirs = small.critic.module, whole.critic.module
    assert not in_bits(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(ValueError, match="starts from files"):
        Engine(paths[0], None, None, tiny_reward(), small_config(model__frozen_bits=8))


def test_a_model_without_linear_layers_is_named() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel hold no"):
        place(family("gpt2"), CPU, ModelConfig(frozen_bits=8))


@pytest.mark.parametrize(
    "knobs",
    [
        {"sharding.zero_stage": 3},
        {"sharding.frozen": "offloaded"},
        {"kl.refresh_every": 2},
        {"model.frozen_bits": 5},
    ],
)
def test_what_it_does_not_go_with_is_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="frozen_bits"):
        load_config(overrides={"model.frozen_bits": 8} | knobs)


@pytest.mark.parametrize("knobs", ["model__frozen_bits=8", "model__critic='policy'"])
def test_no_compiled_code_is_fetched_with_bitsandbytes(knobs: str, tmp_path: Path) -> None:
    """On CPUs that multiply bfloat16 it asks the package `kernels` for some as it is imported."""
    (tmp_path / "kernels").mkdir()
    asked = tmp_path / "asked"
    (tmp_path / "kernels" / "__init__.py").write_text(
        f"def get_kernel(*a, **k):\n    open({str(asked)!r}, 'w').write(str(a))\n    raise ImportError\n"
    )
    code = (
        "from tests.engine.tiny import prompts, small_config, tiny_engine\n"
        f"knobs = dict(model__train='lora', model__critic_train='lora', {knobs})\n"
        "tiny_engine(small_config(**knobs)).step(prompts(8))\n"
        "import sys; print('bitsandbytes' in sys.modules)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("True")
    assert not asked.exists()
