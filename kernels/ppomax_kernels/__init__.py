"""Fused kernels for PPO on language models, as torch ops. Each op has `impl="auto" | "ref" | "cpu" | "triton" |
"cuda"`."""

from .gae import gae
from .kl_penalty import kl_penalty
from .linear_nll import linear_nll
from .linear_ppo_loss import linear_ppo_loss
from .linear_token_logprobs import linear_token_logprobs
from .metrics import Metrics
from .ppo_loss import ppo_loss
from .sample import sample
from .token_logprobs import token_logprobs
from .token_rewards import token_rewards
from .value_loss import value_loss
from .vocab_shard import VocabShard
from .whiten import whiten

__all__ = [
    "Metrics",
    "VocabShard",
    "gae",
    "kl_penalty",
    "linear_nll",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "ppo_loss",
    "sample",
    "token_logprobs",
    "token_rewards",
    "value_loss",
    "whiten",
]
