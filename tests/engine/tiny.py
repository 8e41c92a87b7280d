"""Tiny random models, a word tokenizer and prompts on disk: a whole PPO-max run in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from ppomax.config import TrainConfig, load_config
from ppomax.engine import Engine
from ppomax.models import RewardModel, make_reward_model
from ppomax.saving.model_folder import save_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
BOS, EOS = 1, 2


def tiny_policy(seed: int = 0, hidden: int = 32, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    if not tied:
        with (
            torch.no_grad()
        ):  # far from uniform, so that logprobs, KL and entropy mean something; EOS often, so that lengths vary
            model.lm_head.weight.mul_(15)
            model.lm_head.weight[EOS].mul_(2)
    return model


def tiny_reward(seed: int = 7) -> RewardModel:
    model = make_reward_model(tiny_policy(seed), seed=seed)
    with torch.no_grad():
        model.score.weight.mul_(30)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {w: i for i, w in enumerate([*special, "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def prompts(count: int = 8, seed: int = 0, longest: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [[BOS, *torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()] for n in lengths]


SMALL = {
    "impl": "ref",
    "batch.rollout_size": 8,
    "batch.minibatch_size": 4,
    "batch.micro_tokens": 64,
    "rollout.max_new_tokens": 10,
    "ptx.coef": 0.0,
    "run.steps": 4,
    "run.checkpoint_every": 1,
    "monitor.samples_every": 0,
    "critic.pretrain_steps": 1,
    "critic.pretrain_explained_variance": 0.99,
    "policy_optim.lr": 1e-3,
    "critic_optim.lr": 1e-3,
}


def small_config(preset: str | None = None, **knobs: object) -> TrainConfig:
    """A configuration of seconds; knobs as `loss__clip_low=0.1`."""
    return load_config(preset=preset, overrides={**SMALL, **{k.replace("__", "."): v for k, v in knobs.items()}})


def tiny_engine(config: TrainConfig | None = None, **parts: object) -> Engine:
    parts = {"policy": tiny_policy(), "reference": None, "critic": None, "reward": tiny_reward(), **parts}
    return Engine(
        parts.pop("policy"),
        parts.pop("reference"),
        parts.pop("critic"),
        parts.pop("reward"),
        config or small_config(),
        **parts,
    )


def tiny_assets(folder: Path) -> dict[str, object]:
    """Policy, reward model and prompts in `folder`; the knobs that name them."""
    tokenizer = tiny_tokenizer()
    save_model(tiny_policy(), tokenizer, folder / "policy")
    save_model(tiny_reward(), tokenizer, folder / "reward")
    rows = [{"prompt": tokenizer.decode(p[1:])} for p in prompts(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return {
        "model.policy": str(folder / "policy"),
        "model.reward_model": str(folder / "reward"),
        "data.prompts": str(folder / "prompts.jsonl"),
    }
