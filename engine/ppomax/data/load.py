"""Prompts, preference pairs and texts as token ids, from the usual columns, with every row accounted for.

    prompts, counts = load_prompts("prompts.jsonl", tokenizer, max_prompt_tokens=512)  prompt: string or chat
    pairs, counts = load_pairs("Anthropic/hh-rlhf", tokenizer, max_tokens=512)         chosen / rejected (+ prompt)
    texts, counts = load_texts("reviews.parquet", tokenizer, max_tokens=256)           text | prompt + response | chat
forms.py says in which forms a dialogue may come.

A row with `"complete": false` gets no EOS: its response was cut, as one is at the length limit. A row that cannot be
used is an error by default (`bad_rows="error"`); with "drop" it is counted by reason and logged. The format of the ids
is that of encode.py."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from ppomax.data.encode import (
    BadRow,
    Tokenizer,
    check_tokenizer,
    encode_chat,
    encode_prompt,
    encode_response,
    end_ids,
    is_chat,
    text_of,
)
from ppomax.data.forms import HH_ASSISTANT, HH_HUMAN, plain, split_hh, with_prompt, with_text
from ppomax.data.rows import DataError, Row, Source, read_rows

log = logging.getLogger(__name__)
BadRows = Literal["error", "drop"]


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


def _without_nulls(row: Row, columns: Sequence[str]) -> Row:
    """The row without its null columns, which are absent ones; BadRow if one of `columns` is null."""
    given = {name: value for name, value in row.items() if value is not None}
    null = [column for column in columns if column not in given]
    if null:
        raise BadRow(f"column {null[0]!r} is null", "remove the row or fill it")
    return given


def _need(row: Row, columns: Sequence[str], where: str) -> None:
    missing = [column for column in columns if column not in row]
    if missing:
        raise DataError(f"{where}: column {missing[0]!r} is missing; the row has {sorted(row)}")


class PromptRow(NamedTuple):
    """A prompt and the row that it came from."""

    tokens: list[int]
    row: Row


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
    rows, counts = load_prompt_rows(
        source, tokenizer, max_prompt_tokens, column=column, overlong=overlong, bad_rows=bad_rows, split=split
    )
    return [r.tokens for r in rows], counts


def columns_of(rows: Sequence[PromptRow], names: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """The named columns of these rows, or all that one of them has, None where a row has not."""
    names = dict.fromkeys(k for r in rows for k in r.row) if names is None else names
    return {name: [r.row.get(name) for r in rows] for name in names}


def load_prompt_rows(
    source: Source,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    *,
    column: str = "prompt",
    overlong: Literal["error", "truncate", "drop"] = "error",
    bad_rows: BadRows = "error",
    split: str = "train",
) -> tuple[list[PromptRow], Counts]:
    """As load_prompts, with each prompt's row."""
    check_tokenizer(tokenizer)

    def encode(row: Row) -> PromptRow:
        return PromptRow(tokens_of(row), row)

    def tokens_of(row: Row) -> list[int]:
        value = row[column]
        if is_chat(value) and not value:
            raise BadRow("empty prompt", "remove the row or fill it")
        ids = encode_prompt(value if is_chat(value) else text_of(row, column), tokenizer)
        if len(ids) <= max_prompt_tokens:
            return ids
        if overlong == "truncate":
            counts.reasons["truncated prompt"] += 1
            head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
            return head + ids[len(ids) - max_prompt_tokens + len(head) :]
        raise BadRow(
            "prompt over the limit",
            f"it has {len(ids)} tokens, the limit is {max_prompt_tokens}; raise "
            "max_prompt_tokens or set overlong to truncate or drop",
        )

    counts = Counts(f"prompts of {_name(source)}")
    policy = {"prompt over the limit": "drop" if overlong == "drop" else "error"}
    prepare = partial(with_prompt, column=column)
    return _load(source, (column,), encode, counts, bad_rows, policy, split, prepare), counts.close()


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
    ends = end_ids(tokenizer)

    def encode(row: Row) -> Pair:
        prompt, chosen, rejected = _split_pair(row, tokenizer, ends)
        if not _is_complete(row):
            chosen, rejected = chosen[:-1], rejected[:-1]
        if chosen == rejected:
            raise BadRow("equal sides", "chosen and rejected are the same; remove the row")
        longest = len(prompt) + max(len(chosen), len(rejected))
        if longest > max_tokens:
            raise BadRow(
                "pair over the limit",
                f"it has {longest} tokens, the limit is {max_tokens}; raise max_tokens or drop such rows",
            )
        return Pair(prompt, chosen, rejected, _margin(row))

    counts = Counts(f"pairs of {_name(source)}")
    return _load(source, ("chosen", "rejected"), encode, counts, bad_rows, {}, split, plain), counts.close()


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
    ends = end_ids(tokenizer)

    def encode(row: Row) -> list[Text]:
        prompt, response = _split_text(row, tokenizer, ends)
        if not _is_complete(row):
            response = response[:-1]
        tokens = prompt + response
        start = max(1, len(prompt)) if mask_prompt else 1
        if len(tokens) <= start:
            raise BadRow("no token to learn", "the text or response needs a token after the first")
        if len(tokens) <= max_tokens:
            return [Text(tokens, start)]
        if overlong == "split" and "text" in row:
            counts.reasons["split text"] += 1
            # Neighbours share a token, so that each token is predicted once.
            return [Text(tokens[i : i + max_tokens], 1) for i in range(0, len(tokens) - 1, max_tokens - 1)]
        if overlong == "truncate" and start < max_tokens:
            counts.reasons["truncated text"] += 1
            return [Text(tokens[:max_tokens], start)]
        raise BadRow(
            "text over the limit",
            f"it has {len(tokens)} tokens, the limit is {max_tokens}; raise max_tokens or "
            "set overlong to truncate, split (plain text) or drop",
        )

    counts = Counts(f"texts of {_name(source)}")
    policy = {"text over the limit": "error" if overlong == "error" else "drop"}
    pieces = _load(source, (), encode, counts, bad_rows, policy, split, with_text)
    return [text for piece in pieces for text in piece], counts.close()


def _load(
    source: Source,
    columns: Sequence[str],
    encode: Any,
    counts: Counts,
    bad_rows: BadRows,
    policy: dict[str, str],
    split: str,
    prepare: Callable[[Row], Row],
) -> list[Any]:
    kept = []
    for where, given in read_rows(source, split=split):
        counts.read += 1
        try:
            row = prepare(given)
            _need(row, columns, where)
            kept.append(encode(_without_nulls(row, columns)))
            counts.kept += 1
        except BadRow as bad:
            if policy.get(bad.reason, bad_rows) == "error":
                raise DataError(f"{where}: {bad}") from None
            counts.reasons[bad.reason] += 1
    return kept


def _is_complete(row: Row) -> bool:
    complete = row.get("complete", True)
    if not isinstance(complete, bool):
        raise BadRow("`complete` is no truth value", f"true or false is wanted, got {complete!r:.40}")
    return complete


def _margin(row: Row) -> float:
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise BadRow("`margin` is no finite number", f"got {margin!r:.40}; it is in units of the score")
    return float(margin)


def _split_pair(row: Row, tokenizer: Tokenizer, ends: frozenset[int]) -> tuple[list[int], list[int], list[int]]:
    sides = [row["chosen"], row["rejected"]]
    if sides[0] == sides[1]:
        raise BadRow("equal sides", "chosen and rejected are the same; remove the row")
    if all(is_chat(side) for side in sides):
        shared = list(row["prompt"]) if is_chat(row.get("prompt")) else []
        (prompt, chosen), (other, rejected) = (
            encode_chat(_joined_chat(shared, list(side)), tokenizer, ends) for side in sides
        )
        if prompt != other:
            raise BadRow("prompts differ", "both sides must answer the same dialogue")
        return prompt, chosen, rejected
    texts = [text_of(row, "chosen"), text_of(row, "rejected")]
    if is_chat(row.get("prompt")):
        (prompt, chosen), (_, rejected) = (
            encode_chat([*row["prompt"], {"role": "assistant", "content": text}], tokenizer, ends) for text in texts
        )
        return prompt, chosen, rejected
    if "prompt" in row:
        start = text_of(row, "prompt")
    elif HH_ASSISTANT in texts[0] and HH_HUMAN in texts[0]:
        (start, texts[0]), (other_start, texts[1]) = (split_hh(text) for text in texts)
        if start != other_start:
            raise BadRow("prompts differ", "both sides must answer the same dialogue")
    else:
        start = ""  # whole texts are compared: nothing but BOS comes before them
    chosen, rejected = (encode_response(text, tokenizer) for text in texts)
    return encode_prompt(start, tokenizer), chosen, rejected


def _joined_chat(shared: list[Any], side: list[Any]) -> list[Any]:
    """The dialogue of a `prompt` chat and one side: the side's own turns follow, or the side is the whole dialogue."""
    if side[: len(shared)] == shared:
        return side
    roles = [m.get("role") if isinstance(m, Mapping) else None for m in (*shared[-1:], *side[:1])]
    if len(roles) == 2 and roles[0] == roles[1]:
        raise BadRow(
            "prompt and dialogue do not join",
            f"`prompt` ends with a turn of {roles[0]!r} and the side begins with another; give the dialogue once",
        )
    return shared + side


def _split_text(row: Row, tokenizer: Tokenizer, ends: frozenset[int]) -> tuple[list[int], list[int]]:
    if "messages" in row:
        return encode_chat(row["messages"], tokenizer, ends)
    if "response" in row and "prompt" in row:
        response = text_of(row, "response")
        if is_chat(row["prompt"]):
            return encode_chat([*row["prompt"], {"role": "assistant", "content": response}], tokenizer, ends)
        return encode_prompt(text_of(row, "prompt"), tokenizer), encode_response(response, tokenizer)
    if "text" in row:
        return encode_prompt("", tokenizer), encode_response(text_of(row, "text"), tokenizer)
    raise DataError(f"a text row needs `text`, `prompt` + `response`, or `messages`; this one has {sorted(row)}")


def _name(source: Source) -> str:
    return str(source) if not isinstance(source, (list, tuple)) else "memory"
