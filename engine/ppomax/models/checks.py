"""What must hold of models and prompts before a token is made; each error names the thing and the mend."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.models.branch import TrunkCritic
from ppomax.models.critic import Critic
from ppomax.models.trunk import window_of


def eos_ids_of(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Tokens that end a response: of the generation config, the model config, or the tokenizer, whichever says
    first."""
    for owner in (policy.generation_config, policy.config, tokenizer):
        eos = getattr(owner, "eos_token_id", None)
        if eos is not None:
            return list(eos) if isinstance(eos, (list, tuple)) else [int(eos)]
    raise ValueError(
        "Engine: neither model nor tokenizer has an EOS token, so no response could end; "
        "set eos_token_id in the policy's config"
    )


def check_vocabularies(policy: PreTrainedModel, *others: nn.Module | None) -> None:
    """ValueError if a model's embedding has another number of rows than the policy's: token ids would mean other
    words."""
    rows = vocabulary_rows(policy)
    for other in others:
        if other is None or isinstance(other, TrunkCritic):  # which stands on the policy's own embedding
            continue
        model = other.model if isinstance(other, Critic) else other
        found = vocabulary_rows(model)
        if found != rows:
            raise ValueError(
                f"Engine: the policy has {rows} tokens, the {type(other).__name__} ({type(model).__name__}) has "
                f"{found}; "
                "use models that share one tokenizer"
            )


def vocabulary_rows(model: Any) -> int:
    """Rows of the input embedding: the token ids that the model knows."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # under ZeRO-3 the weight itself is empty


def check_prompts(prompts: list[list[int]], policy: PreTrainedModel, max_new_tokens: int) -> list[list[int]]:
    """`prompts` if there are some, none is empty, all fit the model's window with a response, and all ids are known."""
    if not prompts:
        raise ValueError("Engine: no prompts were given; pass at least one")
    window = window_of(policy.config)
    rows = vocabulary_rows(policy)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"Engine: prompt {i} is empty; a response needs at least one token before it (BOS will do)"
            )
        if len(prompt) + max_new_tokens > window:
            raise ValueError(
                f"Engine: prompt {i} has {len(prompt)} tokens; with rollout.max_new_tokens={max_new_tokens} that is "
                "over the "
                f"model's window of {window}; shorten it or lower rollout.max_new_tokens"
            )
        if min(prompt) < 0 or max(prompt) >= rows:
            raise ValueError(
                f"Engine: prompt {i} has token id {max(prompt)} (least {min(prompt)}), the policy knows 0..{rows - 1}"
            )
    return prompts
