"""Tiny random causal LMs of the families that the rollout promises, far enough from uniform that argmax is clear."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from packaging.version import Version
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, BOS, EOS = 64, 1, 2
SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=0,
    tie_word_embeddings=False,
)
GEMMA = dict(head_dim=12, sliding_window=5, query_pre_attn_scalar=12)


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=BOS, eos_token_id=EOS,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHARED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHARED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHARED, head_dim=20)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHARED, sliding_window=4)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHARED, **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=9.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHARED, **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    ),
    "gpt2": _gpt2,
}


def family(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of that family in evaluation mode: weights large enough that attention and logits are far from flat."""
    torch.manual_seed(seed)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim == 2):
            weight.mul_(0.2 / weight.std())
    if name == "gemma2" and Version(transformers.__version__) < Version("5.23"):  # 5.17's SDPA leaves its cap out
        model.set_attn_implementation("eager")
    return model
