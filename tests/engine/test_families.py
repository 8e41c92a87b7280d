"""Which families of transformers train in which mode, and that a critic and a reward model can be made of each: what
the guide's table says, and no family fails in another way than by a refusal that names it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ppomax.config import load_config
from ppomax.engine import Engine
from ppomax.models import load_policy, load_reward_model, make_reward_model, packed_hidden
from ppomax.models.modes import start_policy
from ppomax.saving.export_policy import export_policy
from ppomax.saving.model_folder import save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

PAGE = Path(__file__).parents[2] / "engine" / "guide" / "families.md"
SHARED = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
EQUAL = dict(num_key_value_heads=4)
FAMILIES: dict[str, dict[str, Any]] = {
    "Apertus": {}, "Arcee": {}, "BitNet": {}, "Bloom": EQUAL, "Cohere": {}, "Cohere2": {},
    "DeepseekV3": dict(**ROUTED, n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
                       qk_nope_head_dim=8, v_head_dim=8, head_dim=4, num_key_value_heads=4),
    "Ernie4_5": {}, "Exaone4": {}, "Falcon": EQUAL, "GPT2": EQUAL, "GPTNeoX": EQUAL, "Gemma": dict(head_dim=8),
    "Gemma2": dict(head_dim=8), "Gemma3Text": dict(head_dim=8), "Glm": dict(head_dim=8), "Glm4": dict(head_dim=8),
    "Glm4Moe": ROUTED, "GptOss": dict(**LOCAL, head_dim=8), "Granite": {}, "GraniteMoe": LOCAL,
    "Helium": dict(head_dim=8), "HunYuanDenseV1": dict(head_dim=8), "Jamba": {}, "Lfm2": {}, "Llama": {}, "Mamba": {},
    "MiniMaxM2": LOCAL,
    "Mistral": {}, "Mixtral": LOCAL, "NanoChat": {}, "Nemotron": {},
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32, **EQUAL),
    "Olmo": {}, "Olmo2": {}, "Olmo3": {}, "Olmoe": EXPERTS, "Persimmon": EQUAL, "Phi": {}, "Phi3": {}, "Qwen2": {},
    "Qwen2Moe": dict(**EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "Qwen3": dict(head_dim=8), "Qwen3Moe": dict(**EXPERTS, moe_intermediate_size=16, head_dim=8),
    "SeedOss": dict(head_dim=8), "SmolLM3": {},
    "StableLm": {}, "Starcoder2": {}, "VaultGemma": dict(head_dim=8),
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"model.train": "lora"},
    "hydra": {"model.train": "hydra", "model.trained_layers": 1, "model.critic": "trunk"},
}


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        getattr(transformers, f"{name}Config")(**{**SHARED, **FAMILIES[name]})
    ).eval()


def scores(name: str, folder: Path) -> None:
    """A reward model is saved, read, and gives the same scores."""
    model = make_reward_model(made(name)).eval()
    again = load_reward_model(save_model(model, None, folder / name)).eval()
    tokens, cu_seqlens = torch.arange(3, 12), torch.tensor([0, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        assert torch.allclose(model.scores(tokens, cu_seqlens), again.scores(tokens, cu_seqlens), atol=1e-6)


def trains(name: str, mode: str) -> None:
    """A step whose first ratios are 1 and whose KL is 0; the start policy is the model as it came."""
    small = {"rollout.max_new_tokens": 6, "batch.rollout_size": 4, "batch.minibatch_size": 4, "ptx.coef": 0.0}
    config = load_config(overrides={"model.critic": "policy", "run.device": "cpu", **small, **MODES[mode]})
    engine = Engine(load_policy(made(name)), None, None, make_reward_model(made(name)), config)
    metrics = engine.step([[1, 5, 6], [1, 7], [1, 8, 9, 3], [1, 4]]).metrics
    assert metrics["val/first_ratio_gap"] < 1e-5
    assert abs(metrics["objective/kl"]) < 1e-4
    assert metrics["rollout/logprob_gap"] < 1e-4
    tokens, cu_seqlens = torch.arange(3, 12), torch.tensor([0, 4, 9], dtype=torch.int32)
    with start_policy(engine.policy, engine.reference) as start, torch.no_grad():
        assert torch.allclose(
            packed_hidden(start, tokens, cu_seqlens),
            packed_hidden(load_policy(made(name)), tokens, cu_seqlens),
            atol=1e-5,
        )


def found(name: str, folder: Path) -> list[str]:
    """A row of the table: yes or no for scorer and modes, and the first words of why not."""
    attempts = [lambda: scores(name, folder), *(lambda mode=mode: trains(name, mode) for mode in MODES)]
    cells, why = [], ""
    for attempt in attempts:
        try:
            attempt()
            cells.append("yes")
        except ValueError as error:  # a refusal; any other error is a fault
            cells.append("no")
            why = why or " ".join(str(error).split())
    return [name, *cells, reason(why)]


def reason(words: str) -> str:
    """A refusal in a few words."""
    known = {
        "is not reached through": "its attention is not transformers' own interface",
        "layer 0 keeps": "keys and values of unequal width",
        "s_aux": "attention sinks",
        "works its layer types out": "no attention in some of its layers",
    }
    return next((short for part, short in known.items() if part in words), words[:60])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_the_guide_says_what_works(name: str, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    version = re.search(r"transformers (\d+\.\d+)", text)
    assert version is not None
    if not transformers.__version__.startswith(version[1]):
        pytest.skip(f"the table is of transformers {version[1]}, this is {transformers.__version__}")
    row = f"| {' | '.join(found(name, tmp_path))} |"
    assert row in text, row


@pytest.mark.parametrize("name", ["Qwen3Moe", "GPTNeoX"])
def test_adapted_models_are_exported_as_transformers_names_their_tensors(name: str, tmp_path: Path) -> None:
    """Experts one by one, old names: what other tools read."""
    small = {"rollout.max_new_tokens": 6, "batch.rollout_size": 4, "batch.minibatch_size": 4, "ptx.coef": 0.0}
    knobs = {"model.critic": "policy", "run.device": "cpu", **small, **MODES["lora"]}
    engine = Engine(load_policy(made(name)), None, None, make_reward_model(made(name)), load_config(overrides=knobs))
    engine.step([[1, 5, 6], [1, 7], [1, 8, 9, 3], [1, 4]])
    export_policy(engine, tmp_path / "ours")
    save_model(made(name), None, tmp_path / "theirs")
    names = [sorted(load_file(tmp_path / side / "model.safetensors")) for side in ("ours", "theirs")]
    assert names[0] == names[1]
    again, tokens = load_policy(tmp_path / "ours"), torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, engine.policy.module(tokens).logits, rtol=1e-4, atol=1e-5)
