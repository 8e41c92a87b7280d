"""Policy, frozen reference, critic and reward model from Hugging Face checkpoints, behind one packed face.

A batch is one row of tokens (N,) with cu_seqlens (S+1,) int32: sequence s is tokens[cu_seqlens[s]:cu_seqlens[s+1]].
    hidden = packed_hidden(model, tokens, cu_seqlens)      (N, D), what the model's head sees
    logits = head_of(model).logits(hidden)                 (N, V); losses take hidden and weight instead, without logits
    values = critic(tokens, cu_seqlens)                    (N,) fp32: V(s) after reading each token
    scores = reward_model.scores(tokens, cu_seqlens)       (S,) fp32: the value at each sequence's last token"""

from ppomax.models.critic import Critic, RewardModel, load_reward_model, make_critic, make_reward_model
from ppomax.models.head import Head, check_head, head_of
from ppomax.models.packed import any_pads, packed_forward, packed_hidden
from ppomax.models.policy import load_policy
from ppomax.models.sources import ModelSource, load_tokenizer, pick_device, use_threads
from ppomax.models.trunk import (
    base_of,
    blocks_name,
    blocks_of,
    embedding_weight,
    freeze,
    train_as_scored,
    window_of,
    window_words,
    with_blocks,
)
from ppomax.models.varlen import set_attention

__all__ = [
    "Critic",
    "Head",
    "ModelSource",
    "RewardModel",
    "any_pads",
    "base_of",
    "blocks_name",
    "blocks_of",
    "check_head",
    "embedding_weight",
    "freeze",
    "head_of",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "make_critic",
    "make_reward_model",
    "packed_forward",
    "packed_hidden",
    "pick_device",
    "set_attention",
    "train_as_scored",
    "use_threads",
    "window_of",
    "window_words",
    "with_blocks",
]
