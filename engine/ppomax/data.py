"""Prompts, preference pairs and texts as token ids, from the usual columns, with every row accounted for.

    prompts, counts = load_prompts("prompts.jsonl", tokenizer, max_prompt_tokens=512)  prompt: string or chat
    pairs, counts = load_pairs("Anthropic/hh-rlhf", tokenizer, max_tokens=512)         chosen / rejected (+ prompt)
    texts, counts = load_texts("reviews.parquet", tokenizer, max_tokens=256)           text | prompt + response | chat

One format everywhere, the one that PPO feeds: BOS once at the front where the tokenizer has one, then prompt, then
response, then EOS. Prompt and response are tokenised apart, so that the boundary is the same as when the policy wrote
the response. A row with `"complete": false` gets no EOS: its response was cut, as one is at the length limit.
A row that cannot be used is an error by default (`bad_rows="error"`); with "drop" it is counted by reason and logged.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from ppomax.rows import DataError, Row, Source, read_rows

__all__ = [
    "Counts",
    "DataError",
    "Pair",
    "Text",
    "check_same_vocabulary",
    "check_tokenizer",
    "encode_prompt",
    "encode_response",
    "load_pairs",
    "load_prompts",
    "load_texts",
]

log = logging.getLogger(__name__)

Tokenizer = PreTrainedTokenizerBase
BadRows = Literal["error", "drop"]
HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Pair:
    """One preference: chosen and rejected answer the same prompt."""

    prompt: list[int]
    """Token ids, BOS included; may be BOS alone (or empty without BOS) when whole texts are compared."""
    chosen: list[int]
    """Response ids, closed by EOS unless the row says `"complete": false`."""
    rejected: list[int]
    """Likewise."""
    margin: float = 0.0
    """By how much chosen should win, in score units (column `margin`)."""


@dataclass(frozen=True)
class Text:
    """One training text."""

    tokens: list[int]
    """BOS, text, EOS (no EOS if the row says `"complete": false`, or its end was cut)."""
    loss_from: int
    """First token that counts in the loss: 1 for plain text, the response's first token when the prompt is masked."""


@dataclass
class Counts:
    """How many rows were read, kept, and left out or cut by reason."""

    name: str
    read: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def close(self) -> Counts:
        """Log the counts; raise DataError if nothing is left."""
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(self.reasons.items())) or "no bad rows"
        log.log(
            logging.WARNING if self.reasons else logging.INFO,
            "%s: read %d rows, kept %d (%s)",
            self.name,
            self.read,
            self.kept,
            reasons,
        )
        if self.kept == 0:
            raise DataError(f"{self.name}: no usable row among {self.read} ({reasons})")
        return self


class _BadRow(Exception):
    def __init__(self, reason: str, mend: str):
        super().__init__(f"{reason}; {mend}")
        self.reason = reason


# ---- tokenizer checks -----------------------------------------------------------------------------------------------


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


# ---- encoding -------------------------------------------------------------------------------------------------------


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _render(messages: Sequence[Row], tokenizer: Tokenizer, *, generation: bool) -> str:
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise _BadRow("malformed chat", "each message needs `role` and `content` strings")
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
    if _is_chat(prompt):
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


def _encode_chat(messages: Sequence[Row], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A chat that ends with the assistant -> (prompt ids, response ids), cut where generation would begin."""
    if not messages or messages[-1].get("role") != "assistant":
        raise _BadRow("chat does not end with the assistant", "the last message must be the response")
    whole = _render(messages, tokenizer, generation=False)
    prompt = _render(messages[:-1], tokenizer, generation=True)
    if not whole.startswith(prompt):  # some templates drop the generation marker from finished turns
        prompt = _render(messages[:-1], tokenizer, generation=False)
    if not whole.startswith(prompt):
        raise _BadRow("chat template rewrites the prompt", "the rendered chat must begin with its rendered prompt")
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return list(prompt_ids), encode_response(whole[len(prompt) :], tokenizer)


def _string(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise _BadRow(f"`{column}` is {type(value).__name__}", "a string is wanted")
    if not value.strip():
        raise _BadRow(f"empty {column}", "remove the row or fill it")
    return value


def _need(row: Row, columns: Sequence[str], where: str) -> None:
    missing = [column for column in columns if column not in row]
    if missing:
        raise DataError(f"{where}: column {missing[0]!r} is missing; the row has {sorted(row)}")


# ---- loaders --------------------------------------------------------------------------------------------------------


def load_prompts(
    source: Source,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    *,
    column: str = "prompt",
    overlong: Literal["error", "truncate", "drop"] = "error",
    bad_rows: BadRows = "error",
    split: str = "train",
) -> tuple[list[list[int]], Counts]:
    """Prompts as token ids (BOS first where there is one), in the file's order, and the counts.

    overlong: a prompt of more than max_prompt_tokens is an error, keeps BOS and its last tokens, or is left out.
    """
    check_tokenizer(tokenizer)

    def encode(row: Row) -> list[int]:
        value = row[column]
        if _is_chat(value) and not value:
            raise _BadRow("empty prompt", "remove the row or fill it")
        ids = encode_prompt(value if _is_chat(value) else _string(row, column), tokenizer)
        if len(ids) <= max_prompt_tokens:
            return ids
        if overlong == "truncate":
            counts.reasons["truncated prompt"] += 1
            head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
            return head + ids[len(ids) - max_prompt_tokens + len(head) :]
        raise _BadRow(
            "prompt over the limit",
            f"it has {len(ids)} tokens, the limit is {max_prompt_tokens}; raise "
            "max_prompt_tokens or set overlong to truncate or drop",
        )

    counts = Counts(f"prompts of {_name(source)}")
    policy = {"prompt over the limit": "drop" if overlong == "drop" else "error"}
    return _load(source, (column,), encode, counts, bad_rows, policy, split), counts.close()


def load_pairs(
    source: Source,
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    bad_rows: BadRows = "error",
    split: str = "train",
) -> tuple[list[Pair], Counts]:
    """Preference pairs. `chosen` / `rejected` are responses to `prompt`, or whole dialogues (chats, or HH-RLHF's
    "\\n\\nHuman: ... \\n\\nAssistant: ..." strings, cut at the last assistant turn), or whole texts where nothing
    is shared.

    max_tokens: limit on prompt + response of either side; a longer pair is bad (cutting a response would move the token
    that is scored). Other bad rows: equal sides, empty prompt or response, prompts that differ.
    """
    check_tokenizer(tokenizer)

    def encode(row: Row) -> Pair:
        prompt, chosen, rejected = _split_pair(row, tokenizer)
        if not row.get("complete", True):
            chosen, rejected = chosen[:-1], rejected[:-1]
        if chosen == rejected:
            raise _BadRow("equal sides", "chosen and rejected are the same; remove the row")
        longest = len(prompt) + max(len(chosen), len(rejected))
        if longest > max_tokens:
            raise _BadRow(
                "pair over the limit",
                f"it has {longest} tokens, the limit is {max_tokens}; raise max_tokens or drop such rows",
            )
        return Pair(prompt, chosen, rejected, float(row.get("margin") or 0.0))

    counts = Counts(f"pairs of {_name(source)}")
    return _load(source, ("chosen", "rejected"), encode, counts, bad_rows, {}, split), counts.close()


def load_texts(
    source: Source,
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    mask_prompt: bool = True,
    overlong: Literal["error", "truncate", "split", "drop"] = "error",
    bad_rows: BadRows = "error",
    split: str = "train",
) -> tuple[list[Text], Counts]:
    """Texts for language modelling (`text`) or fine-tuning (`prompt` + `response`, or `messages` ending with the
    assistant).

    mask_prompt: the loss starts at the response. overlong: longer than max_tokens is an error, loses its end (EOS
    too, as the text does not end there), becomes several texts (plain text only, counted), or is left out.
    """
    check_tokenizer(tokenizer)
    if max_tokens < 2:
        raise DataError(f"load_texts: max_tokens must be at least 2, got {max_tokens}")

    def encode(row: Row) -> list[Text]:
        prompt, response = _split_text(row, tokenizer)
        if not row.get("complete", True):
            response = response[:-1]
        tokens = prompt + response
        start = max(1, len(prompt)) if mask_prompt else 1
        if len(tokens) <= start:
            raise _BadRow("no token to learn", "the text or response needs a token after the first")
        if len(tokens) <= max_tokens:
            return [Text(tokens, start)]
        if overlong == "split" and "text" in row:
            counts.reasons["split text"] += 1
            # Neighbours share a token, so that each token is predicted once.
            return [Text(tokens[i : i + max_tokens], 1) for i in range(0, len(tokens) - 1, max_tokens - 1)]
        if overlong == "truncate" and start < max_tokens:
            counts.reasons["truncated text"] += 1
            return [Text(tokens[:max_tokens], start)]
        raise _BadRow(
            "text over the limit",
            f"it has {len(tokens)} tokens, the limit is {max_tokens}; raise max_tokens or "
            "set overlong to truncate, split (plain text) or drop",
        )

    counts = Counts(f"texts of {_name(source)}")
    policy = {"text over the limit": "error" if overlong == "error" else "drop"}
    pieces = _load(source, (), encode, counts, bad_rows, policy, split)
    return [text for piece in pieces for text in piece], counts.close()


def _load(
    source: Source,
    columns: Sequence[str],
    encode: Any,
    counts: Counts,
    bad_rows: BadRows,
    policy: dict[str, str],
    split: str,
) -> list[Any]:
    kept = []
    for where, row in read_rows(source, split=split):
        counts.read += 1
        _need(row, columns, where)
        try:
            kept.append(encode(row))
            counts.kept += 1
        except _BadRow as bad:
            if policy.get(bad.reason, bad_rows) == "error":
                raise DataError(f"{where}: {bad}") from None
            counts.reasons[bad.reason] += 1
    return kept


def _split_pair(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    sides = [row["chosen"], row["rejected"]]
    if sides[0] == sides[1]:
        raise _BadRow("equal sides", "chosen and rejected are the same; remove the row")
    if all(_is_chat(side) for side in sides):
        shared = list(row["prompt"]) if _is_chat(row.get("prompt")) else []
        (prompt, chosen), (other, rejected) = (_encode_chat([*shared, *side], tokenizer) for side in sides)
        if prompt != other:
            raise _BadRow("prompts differ", "both sides must answer the same dialogue")
        return prompt, chosen, rejected
    texts = [_string(row, "chosen"), _string(row, "rejected")]
    if _is_chat(row.get("prompt")):
        (prompt, chosen), (_, rejected) = (
            _encode_chat([*row["prompt"], {"role": "assistant", "content": text}], tokenizer) for text in texts
        )
        return prompt, chosen, rejected
    if "prompt" in row:
        start = _string(row, "prompt")
    elif HH_ASSISTANT in texts[0] and HH_HUMAN in texts[0]:
        (start, texts[0]), (other_start, texts[1]) = (_split_hh(text) for text in texts)
        if start != other_start:
            raise _BadRow("prompts differ", "both sides must answer the same dialogue")
    else:
        start = ""  # whole texts are compared: nothing but BOS comes before them
    chosen, rejected = (encode_response(text, tokenizer) for text in texts)
    return encode_prompt(start, tokenizer), chosen, rejected


def _split_hh(text: str) -> tuple[str, str]:
    """Dialogue -> (everything up to and with the last "\\n\\nAssistant:", what follows)."""
    prompt, marker, response = text.rpartition(HH_ASSISTANT)
    if not marker or HH_HUMAN in response:
        raise _BadRow("dialogue does not end with the assistant", "each side must end with an assistant turn")
    if not response.strip():
        raise _BadRow("empty response", "remove the row or fill it")
    return prompt + marker, response


def _split_text(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    if "messages" in row:
        return _encode_chat(row["messages"], tokenizer)
    if "response" in row and "prompt" in row:
        if _is_chat(row["prompt"]):
            return _encode_chat([*row["prompt"], {"role": "assistant", "content": _string(row, "response")}], tokenizer)
        return encode_prompt(_string(row, "prompt"), tokenizer), encode_response(_string(row, "response"), tokenizer)
    if "text" in row:
        return encode_prompt("", tokenizer), encode_response(_string(row, "text"), tokenizer)
    raise DataError(f"a text row needs `text`, `prompt` + `response`, or `messages`; this one has {sorted(row)}")


def _name(source: Source) -> str:
    return str(source) if not isinstance(source, (list, tuple)) else "memory"
