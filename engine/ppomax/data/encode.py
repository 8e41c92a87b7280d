"""Strings and chats as token ids, in one format everywhere, the one that PPO feeds: BOS once at the front where the
tokenizer has one, then prompt, then response, then EOS. Prompt and response are tokenised apart, so that the boundary
is the same as when the policy wrote the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from ppomax.data.rows import DataError, Row

Tokenizer = PreTrainedTokenizerBase


class BadRow(Exception):
    """A row that cannot be used: the `reason` it is counted under, and the mend."""

    def __init__(self, reason: str, mend: str):
        super().__init__(f"{reason}; {mend}")
        self.reason = reason


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise DataError unless the tokenizer has an EOS and a pad token, not the same (a pad that is EOS hides ends)."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{name}: the tokenizer has no EOS token, so no response could end; set tokenizer.eos_token to the "
            "token that the model was trained to end with and save the tokenizer"
        )
    mend = (
        "add one by tokenizer.add_special_tokens({'pad_token': '<pad>'}), then model.resize_token_embeddings("
        "len(tokenizer)), and save both; or name an unused reserved token"
    )
    if tokenizer.pad_token_id is None:
        raise DataError(f"{name}: the tokenizer has no pad token; {mend}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise DataError(
            f"{name}: pad and EOS are the same token {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), "
            f"so masks would hide real ends; {mend}"
        )


def check_same_vocabulary(policy: Tokenizer, reward_model: Tokenizer) -> None:
    """Raise DataError unless both map every token to the same id: one token row is fed to both models."""
    ours, theirs = policy.get_vocab(), reward_model.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise DataError(
        f"policy and reward model have different vocabularies ({len(ours)} and {len(theirs)} tokens, {len(different)} "
        f"differ, first {different[0]!r}: {ours.get(different[0])} and {theirs.get(different[0])}); train the "
        "reward model with the policy's tokenizer, or score decoded text by a reward function"
    )


def is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _render(messages: Sequence[Row], tokenizer: Tokenizer, *, generation: bool) -> str:
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise BadRow("malformed chat", "each message needs `role` and `content` strings")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{tokenizer.name_or_path}: chats need a chat template, and this tokenizer has none; set "
            "tokenizer.chat_template or give plain strings"
        )
    return str(
        tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=generation)
    )


def encode_prompt(prompt: str | Sequence[Row], tokenizer: Tokenizer) -> list[int]:
    """Prompt string or chat -> ids, with BOS where the tokenizer adds one and without a closing EOS."""
    if is_chat(prompt):
        text = _render(cast("Sequence[Row]", prompt), tokenizer, generation=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(prompt, add_special_tokens=True)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id and len(ids) > (tokenizer.bos_token_id == tokenizer.eos_token_id):
        ids.pop()
    return ids


def encode_response(response: str, tokenizer: Tokenizer) -> list[int]:
    """Response string -> ids closed by one EOS, no BOS."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id in ids:  # a chat template closes the turn itself; what follows (a newline) is not sampled
        return ids[: ids.index(tokenizer.eos_token_id) + 1]
    return [*ids, tokenizer.eos_token_id]


def encode_chat(messages: Sequence[Row], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A chat that ends with the assistant -> (prompt ids, response ids), cut where generation would begin."""
    if not messages or messages[-1].get("role") != "assistant":
        raise BadRow("chat does not end with the assistant", "the last message must be the response")
    whole = _render(messages, tokenizer, generation=False)
    prompt = _render(messages[:-1], tokenizer, generation=True)
    if not whole.startswith(prompt):  # some templates drop the generation marker from finished turns
        prompt = _render(messages[:-1], tokenizer, generation=False)
    if not whole.startswith(prompt):
        raise BadRow("chat template rewrites the prompt", "the rendered chat must begin with its rendered prompt")
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return list(prompt_ids), encode_response(whole[len(prompt) :], tokenizer)


def text_of(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"`{column}` is {type(value).__name__}", "a string is wanted")
    if not value.strip():
        raise BadRow(f"empty {column}", "remove the row or fill it")
    return value
