"""Strings and chats as token ids, in one format everywhere, the one that PPO feeds: BOS once at the front where the
tokenizer has one, then prompt, then response, then EOS. Prompt and response are tokenised apart, so that the boundary
is the same as when the policy wrote the response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from ppomax.data.rows import DataError, Row

Tokenizer = PreTrainedTokenizerBase


class BadRow(DataError):
    """A row that cannot be used: the `reason` it is counted under, and the mend."""

    def __init__(self, reason: str, mend: str):
        super().__init__(f"{reason}; {mend}")
        self.reason = reason


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise DataError unless the tokenizer has an EOS token. A pad token is not needed: nothing here pads with one."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{tokenizer.name_or_path or type(tokenizer).__name__}: the tokenizer has no EOS token, so no response "
            "could end; set tokenizer.eos_token to the token that the model was trained to end with and save the "
            "tokenizer"
        )


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that responses in this tokenizer's data end with: its EOS, and the special token by which its chat
    template closes an assistant's turn, where that is another one. Empty without an EOS token."""
    eos = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if not getattr(tokenizer, "chat_template", None):
        return frozenset(eos)
    word = "ppomax"
    turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
    try:
        closing = _render(turns, tokenizer, generation=False).rpartition(word)[2]
    except DataError:  # a template that refuses so plain a chat will be heard of when a row is rendered
        return frozenset(eos)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return frozenset(eos | set(_ids(closing, tokenizer)[:1]) & special)


def check_same_vocabulary(policy: Tokenizer, reward_model: Tokenizer) -> None:
    """Raise DataError unless both map every token to the same id: one token row is fed to both models."""
    ours, theirs = policy.get_vocab(), reward_model.get_vocab()
    if ours == theirs:
        return
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise DataError(
        f"policy and reward model have different vocabularies ({len(ours)} and {len(theirs)} tokens, {len(different)} "
        f"differ, first {different[0]!r}: {ours.get(different[0])} and {theirs.get(different[0])}); set "
        "reward.tokenizer, by which the reward model then reads text, or train it with the policy's tokenizer"
    )


def is_chat(value: Any) -> bool:
    """Whether `value` is a list of messages, and no string."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _render(messages: Sequence[Row], tokenizer: Tokenizer, *, generation: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{tokenizer.name_or_path}: chats need a chat template, and this tokenizer has none; set "
            "tokenizer.chat_template or give plain strings"
        )
    plain = [dict(m) for m in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generation))
    except Exception as error:  # by whatever the template does
        raise BadRow(
            "the chat template refuses it", f"{type(error).__name__}: {error}; look at the roles and their order"
        ) from error


def _checked_chat(messages: Any) -> Sequence[Row]:
    good = is_chat(messages) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good:
        raise BadRow("malformed chat", "a list of messages with `role` and `content` strings is wanted")
    if not messages:
        raise BadRow("empty chat", "remove the row or fill it")
    return messages  # type: ignore[no-any-return]


def _ids(text: str, tokenizer: Tokenizer, *, special: bool = False) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # a lone surrogate, for one
        raise BadRow(
            "cannot be tokenised", f"{type(error).__name__}: {error}; mend the text, which is not Unicode"
        ) from error


def encode_prompt(prompt: str | Sequence[Row], tokenizer: Tokenizer) -> list[int]:
    """Prompt string or chat -> ids, with BOS once where the tokenizer adds one, and without a closing EOS. A string
    that was rendered from a chat, BOS and all, gives what the chat gives. BadRow for what cannot be one."""
    if is_chat(prompt):
        chat = _checked_chat(prompt)
        return _ids(_render(chat, tokenizer, generation=True), tokenizer)
    text = cast("str", prompt)
    ids, bos = _ids(text, tokenizer, special=True), tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token)):
        ids = ids[1:]
    while ids and ids[-1] == tokenizer.eos_token_id and len(ids) > (bos == tokenizer.eos_token_id):
        ids.pop()
    return ids


def encode_response(response: str, tokenizer: Tokenizer, ends: frozenset[int] = frozenset()) -> list[int]:
    """Response string -> ids closed by one EOS, no BOS. `ends`: tokens that close it as well as EOS, as a chat's turn
    is closed. What follows may be white space or special tokens, which are not sampled; BadRow if it is text."""
    ids = _ids(response, tokenizer)
    closing = ends | {tokenizer.eos_token_id}
    at = next((i for i, token in enumerate(ids) if token in closing), None)
    if at is None:
        return [*ids, tokenizer.eos_token_id]
    lost = str(tokenizer.decode(ids[at + 1 :], skip_special_tokens=True)).strip()
    if lost:
        raise BadRow(
            "text after the end token",
            f"{tokenizer.convert_ids_to_tokens(ids[at])!r} stands inside the response, and {lost[:40]!r} after it; "
            "remove or rewrite it",
        )
    return ids[: at + 1]


def encode_chat(messages: Any, tokenizer: Tokenizer, ends: frozenset[int]) -> tuple[list[int], list[int]]:
    """A chat that ends with the assistant -> (prompt ids, response ids), cut where generation would begin; `ends` as
    `end_ids` gives them."""
    messages = _checked_chat(messages)
    if messages[-1]["role"] != "assistant":
        raise BadRow("chat does not end with the assistant", "the last message must be the response")
    if len(messages) == 1:
        raise BadRow("chat without a prompt", "a turn must come before the assistant's")
    if not messages[-1]["content"].strip():
        raise BadRow("empty response", "remove the row or fill it")
    whole = _render(messages, tokenizer, generation=False)
    prompt = _render(messages[:-1], tokenizer, generation=True)
    if not whole.startswith(prompt):  # some templates drop the generation marker from finished turns
        prompt = _render(messages[:-1], tokenizer, generation=False)
    if not whole.startswith(prompt):
        raise BadRow("chat template rewrites the prompt", "the rendered chat must begin with its rendered prompt")
    return _ids(prompt, tokenizer), encode_response(whole[len(prompt) :], tokenizer, ends)


def text_of(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"`{column}` is {type(value).__name__}", "a string is wanted")
    if not value.strip():
        raise BadRow(f"empty {column}", "remove the row or fill it")
    return value


def prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Of a prompt in any form: token ids as they are, text or a chat (messages) by the tokenizer. ValueError: that is
    needed and None."""
    if not isinstance(prompt, str) and not any(isinstance(x, Mapping) for x in prompt[:1]):
        return list(prompt)
    if tokenizer is None:
        raise ValueError("Engine: text prompts need a tokenizer; pass tokenizer=, or prompts as token ids")
    return encode_prompt(prompt, tokenizer)
