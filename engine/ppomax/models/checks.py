"""What must hold of models and prompts before a token is made; each error names the thing and the mend."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.data import end_ids
from ppomax.models.adapter_critic import AdapterCritic
from ppomax.models.branch import TrunkCritic
from ppomax.models.critic import Critic
from ppomax.models.trunk import window_of, window_words

log = logging.getLogger(__name__)


def eos_ids_of(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Tokens that end a response: what the generation config names, or else the model's, and what the tokenizer's data
    end with (see data.end_ids). ValueError: there are none."""
    ends: set[int] = set()
    for owner in (policy.generation_config, policy.config):
        eos = getattr(owner, "eos_token_id", None)
        if eos is not None and not ends:
            ends = set(eos) if isinstance(eos, (list, tuple)) else {int(eos)}
    taught = end_ids(tokenizer) if tokenizer is not None else frozenset()
    if ends and taught - ends:
        log.info(
            "responses end at the tokenizer's own end tokens %s too, which the model's configuration does not name",
            sorted(taught - ends),
        )
    if not ends | taught:
        raise ValueError(
            "Engine: neither model nor tokenizer has an EOS token, so no response could end; "
            "set eos_token_id in the policy's config"
        )
    return sorted(ends | taught)


def check_vocabularies(policy: PreTrainedModel, *others: nn.Module | None) -> None:
    """ValueError if a model's embedding has another number of rows than the policy's: token ids would mean other
    words."""
    rows = vocabulary_rows(policy)
    for other in others:
        other = other.base if isinstance(other, AdapterCritic) else other
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
                f"over {window_words(policy.config)}; shorten it or lower rollout.max_new_tokens"
            )
        if min(prompt) < 0 or max(prompt) >= rows:
            raise ValueError(
                f"Engine: prompt {i} has token id {max(prompt)} (least {min(prompt)}), the policy knows 0..{rows - 1}"
            )
    return prompts
